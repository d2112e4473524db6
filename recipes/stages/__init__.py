"""The stages, one module each. A module has the name of its settings' folder in ``conf/stage``."""

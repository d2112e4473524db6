"""The stages, one module each, named as their folders in ``conf/stage``."""

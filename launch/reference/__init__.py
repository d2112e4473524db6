"""Pages of ``docs`` that are written from the code: every rule and error, every field."""

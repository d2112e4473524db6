"""Pages of ``docs`` that are written from the code: every rule, error, field and licence."""

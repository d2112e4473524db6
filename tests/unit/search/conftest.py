"""Makes plans faster."""

from tests.support.plans import plan as plan

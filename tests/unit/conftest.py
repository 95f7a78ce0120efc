"""Settings of hypothesis for these tests: the same examples in every run, and no database."""

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

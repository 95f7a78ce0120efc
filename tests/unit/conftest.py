"""Settings of hypothesis for these tests, and calls beside the test that cannot hang it."""

import threading
from concurrent.futures import Future

import pytest
from hypothesis import settings

# The same examples in every run, and no database.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")


class Pool:
    """Calls functions, each in a thread of its own that ends with the process at the latest.

    An executor would wait for its threads, and so turn a test that fails into one that hangs.
    """

    def submit(self, function, *args, **kwargs):
        future = Future()

        def work():
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future


@pytest.fixture
def pool():
    """Runs functions beside the test: ``pool.submit(function, ...)`` gives a Future."""
    return Pool()

"""These tests are for the environments of Tensor2Tensor: `make test-t2t` and `make test-t2t-tf1`."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("tensor2tensor") else ["test_*.py"]


def pytest_configure(config):
    """What these old packages use is deprecated, and stays so: warnings about it would hide others."""
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore::FutureWarning")

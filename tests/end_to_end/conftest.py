"""Inputs that the whole-script tests share."""

import pytest

from tests.end_to_end import assets


@pytest.fixture(scope="session")
def tiny():
    """A model of random weights whose head is not tied, as in most models that need several devices."""
    return assets.tiny_model_folder(tied=False)


@pytest.fixture(scope="session")
def smollm2():
    return assets.smollm2_folder()


@pytest.fixture(scope="session")
def text():
    return assets.text_file()


@pytest.fixture(scope="session")
def chat():
    return assets.chat_file()

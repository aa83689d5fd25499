import pytest

from balance_shim.logits import chunks
from tests.logits.small_models import CHUNK, VOCABULARY


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Eight rows of logits fit into a chunk, however many there are."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK * chunks.BYTES_PER_LOGIT * VOCABULARY)

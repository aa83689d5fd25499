"""The size of a chunk of logits. A row is one token; sizes in bytes."""

CHUNK_BYTES = 512 * 1024**2

# At the peak of a chunk: the logits in half precision and in float32, their log-softmax, and a gradient of either.
BYTES_PER_LOGIT = 12

# Each chunk adds its gradient to that of a head that trains, in the precision of its weight: more additions would
# round off too much of it, and between them there are two gradients of the size of the weight anyway.
MOST_CHUNKS_IN_TRAINING = 16


def rows_in_chunk(rows: int, vocabulary: int, head_trains: bool) -> int:
    """Return the rows of a chunk, which is `rows` or more where chunks do not pay."""
    fitting = max(1, CHUNK_BYTES // (BYTES_PER_LOGIT * vocabulary))
    chunk = 1 << (fitting.bit_length() - 1)  # kernels like powers of two
    if head_trains:
        chunk = max(chunk, -(-rows // MOST_CHUNKS_IN_TRAINING))
    return chunk if 2 * chunk <= rows else rows

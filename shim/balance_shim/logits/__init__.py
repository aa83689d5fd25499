"""Logits that are never there all at once: the head runs chunk by chunk where something is asked of them.

The head's output in a training forward is a `DeferredLogits`, a tensor with a shape and no values, which remembers the
hidden states. Cross-entropy and other sums over the vocabulary compute them in chunks, and again in the backward pass;
everything else gets them in full.
"""

"""From sources of documents to batches of tokens, in an order that a resumed run repeats.

Empty, because a worker process enters this package without importing torch.
"""

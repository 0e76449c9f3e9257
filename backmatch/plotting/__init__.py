"""``backmatch plot``: figures from what runs, comparisons and analyses left; nothing is computed.

Nothing here imports torch.
"""

"""Does a layer compute with the R and W_g that you take from it? To be pasted; it needs torch alone. MIT licence."""

import torch


@torch.no_grad()
def check_layer(R, W_g, x, scores, seen, K):
    """AssertionError unless a layer routes by R [n, d], and x W_g[j], with W_g [n, d, D], enters its activation.

    x [..., d]: dozens of random tokens, as router and experts get them. scores and seen: lists of what was recorded in
    the layer's forward: router logits [..., n] before softmax or sigmoid, and what enters the activation in the routed
    experts [..., D]. K: experts per token. Random weights, biases 0, eval mode; no groups of experts, no expert choice.
    """
    unit = lambda rows: torch.nn.functional.normalize(rows, dim=-1)  # directions: the layer may scale what it gets
    R, W_g = R.double(), W_g.double()  # which autocast leaves alone
    x, scores, seen = (torch.cat([t.double().flatten(0, -2) for t in tensors]) for tensors in ([x], scores, seen))
    mine, theirs = (unit(s - s.mean(dim=-1, keepdim=True)) for s in (x @ R.T, scores))          # (N, n) each
    alike = (mine * theirs).sum(dim=-1).mean()
    assert alike > 0.999, f"scores are not x R^T (cosine {alike:.3f}): another R or order, a bias, no linear router"
    rows = seen[seen.any(dim=-1)]  # without the empty places of a capacity limit
    match = unit(x @ W_g) @ unit(rows).T > 0.999                                                # (n, N, rows)
    known = match.flatten(0, 1).any(dim=0)                                                              # (rows,)
    assert known.any() and known.all(), (f"{known.sum()} of {len(rows)} rows are an x W_g[j]: another matrix or layout,"
                                         " a bias, rows of a shared expert, or a map before the experts")
    astray = match.any(dim=-1).T & (scores < scores.topk(K).values[:, -1:])                             # (N, n)
    assert not astray.any(), f"{astray.sum()} times W_g[j] saw a token without j in its top {K}: another order"

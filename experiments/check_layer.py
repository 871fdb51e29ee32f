"""Does a layer compute with the R and W_g that you take from it? To be pasted; it needs torch alone. MIT licence."""

import torch


@torch.no_grad()
def check_layer(R, W_g, x, scores, seen, K):
    """AssertionError unless a layer routes by R [n, d], and x W_g[j], with W_g [n, d, D], enters its activation.

    x [..., d]: random tokens, as router and experts get them; each expert gets one or more. scores, seen: lists of what
    was recorded in one forward: router logits [..., n] before softmax or sigmoid, and what enters the activation in the
    routed experts [..., D]. K: experts per token. Random weights, biases 0, eval mode; no expert groups or choice.
    """
    unit = lambda rows: torch.nn.functional.normalize(rows, dim=-1)  # directions: the layer may scale what it gets
    R, W_g = R.double(), W_g.double()  # which autocast leaves alone
    assert [{t.size(-1) for t in each} for each in ([x], scores, seen)] == [{R.size(1)}, {len(R)}, {W_g.size(2)}], (
        f"x, scores, seen are not {R.size(1)}, {len(R)}, {W_g.size(2)} wide: nothing recorded, or gate and up together")
    x, scores, seen = (torch.cat([t.double().reshape(-1, t.size(-1)) for t in each]) for each in ([x], scores, seen))
    assert len(scores) == len(x), f"{len(scores)} rows of scores for {len(x)} tokens: record a single forward"
    mine, theirs = (unit(s - s.mean(dim=-1, keepdim=True)) for s in (x @ R.T, scores))          # (N, n) each
    alike = (mine * theirs).sum(dim=-1).mean()
    assert alike > 0.999, f"scores are not x R^T (cosine {alike:.3f}): another R or order, a bias, no linear router"
    match = unit(x @ W_g) @ unit(seen[seen.any(dim=-1)]).T > 0.999  # (n, N, rows), but for empty places of a capacity
    saw, known = match.any(dim=-1).T, match.flatten(0, 1).any(dim=0)                            # (N, n), (rows,)
    assert known.any() and known.all(), (
        f"{known.sum()} of {len(known)} rows are an x W_g[j]: another matrix or layout, a bias, a shared expert, a map")
    assert saw.any(dim=0).all(), f"the experts saw {saw.sum(dim=0).tolist()} tokens: pass more, so that each sees one"
    most = saw.sum(dim=1).max()
    assert most == K, f"a token reaches {most} experts, and K is {K}"
    astray = saw & (scores < scores.topk(K).values[:, -1:])                                     # (N, n)
    assert not astray.any(), f"{astray.sum()} times W_g[j] saw a token without j in its top {K}: another order"

"""The shapes in comments are true: each file runs with another size for every letter, and is watched line by line."""

import inspect
import re
import sys

import torch
from torch.utils._pytree import tree_leaves

import erc_moe
import train


def false_comments(module, size, work):
    """Runs work(); compares comments like # (N, K), -, (N, K) or # (B, T, d) each with what their line assigned."""
    claims, wrong, previous = {}, set(), {}
    for number, line in enumerate(inspect.getsource(module).splitlines(), start=1):
        if found := re.match(r"\s+(return|[\w*, ]+ [+|]?=) .*  # (\(.*)", line):
            claims[number] = re.findall(r"\w+", found[1].removeprefix("return")), found[2]
    never = set(claims)

    def check(frame, event, result):
        line = previous.pop(frame, None)  # a line is announced before it runs, so look at the one before
        if line in claims and event in ("line", "return"):
            names, comment = claims[line]
            values = tree_leaves([frame.f_locals[name] for name in names] or result)
            shapes = re.findall(r"\([^()]*\)|-(?=,)", comment) * (len(values) if ") each" in comment else 1)
            wanted = [eval(shape, dict(size)) if shape != "-" else None for shape in shapes]
            never.discard(line)
            if wanted != [tuple(value.shape) if shape else None for value, shape in zip(values, wanted)]:
                wrong.add(f"line {line} claims {comment}, but has {[list(value.shape) for value in values]}")
        previous[frame] = frame.f_lineno
        return check

    def trace(frame, event, result):
        inside = frame.f_code.co_filename == module.__file__ and not frame.f_code.co_name.startswith("<")
        return check if inside else None

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    assert len(claims) > 10, f"this test is blind: {len(claims)} comments"
    return sorted(wrong) + [f"line {line} never ran" for line in sorted(never)]


def test_every_shape_comment_of_erc_moe_is_true():
    """Loss, model, sampling and heat map."""
    size = dict(B=4, T=5, N=20, V=11, L=2, H=3, n=7, K=6, d=48, D=24, vocab_size=9)  # d/H = 16, d/H/2 = 8
    config = erc_moe.MoEConfig(*(size[letter] for letter in "VTLHdDnK"))
    tokens = torch.randint(size["V"], (size["B"], size["T"]))

    def work():
        model = erc_moe.MoETransformer(config)
        moe = model.moe_layers()[0]
        model(tokens, tokens)
        model.erc_loss()
        M = erc_moe.activation_norms(moe.R, moe.W_g)
        erc_moe.coupling_report(M)
        erc_moe.heat_map(M)
        for temperature in (0, 1.0):
            model.generate(tokens, 1, temperature, stop=0, vocab_size=size["vocab_size"])

    assert false_comments(erc_moe, size, work) == []


def test_every_shape_comment_of_train_is_true(data, elsewhere, monkeypatch):
    """A run of two steps, with batches, evaluation, log and sample."""
    size = dict(B=4, T=5, N=20, L=2, n=7, K=3, d=16)
    monkeypatch.setattr(train, "VAL_WINDOWS", 2 * size["B"])
    config, moe = train.configs(dict(
        data=data, steps=2, warmup=1, batch_size=size["B"], context_length=size["T"], n_layers=size["L"], n_heads=2,
        d_model=size["d"], d_expert=8, n_experts=size["n"], top_k=size["K"], sample_tokens=1, device="cpu"))

    def work():
        run = train.Run(config, moe)
        train.train(run)
        train.sample(run.model, train.prepare_data.get_tokenizer("bytes"), "fox ", config)  # end-of-text and 4 bytes

    assert false_comments(train, size, work) == []

"""The comparison: every variant starts from the same weights, what is measured equals loops, and no result is lost.

Nothing here trains for long; the results themselves are compared with the texts in test_readme.py.
"""

import json
import math

import pytest
import report
import reproduce
import torch

import prepare_data
import train
from erc_moe import MoEConfig, MoETransformer
from prepare_data import TokenData, UserError

EOT = 0
DOCUMENTS = [("sums", [5, 6, 7, 8]), ("story", [9, 10, 11]), ("sums", [6, 5, 8, 7, 6]), ("story", [11, 12, 9, 10])]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MoETransformer(MoEConfig(16, 8, n_layers=2, n_heads=2, d_model=16, d_expert=8, n_experts=6, top_k=2))


@pytest.fixture
def data():
    """Four validation documents of two kinds, in one shard."""
    tokens, spans = [], []
    for kind, ids in DOCUMENTS:
        spans.append([kind, len(tokens), len(tokens) + len(ids) + 1])
        tokens += [*ids, EOT]
    shard = torch.tensor(tokens, dtype=torch.uint16)
    return TokenData("bytes", 16, EOT, [shard], [shard], [], {"val_documents": spans}, "")


def inputs_of_layers(model, ids):
    """What each MoE layer is given for one document, alone in its batch: list [L] of [T, d]."""
    seen = []
    hooks = [moe.register_forward_pre_hook(lambda moe, args: seen.append(args[0][0])) for moe in model.moe_layers()]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_what_is_measured_on_tokens_equals_loops(model, data):
    """Token by token, expert by expert, without padding: agreement, within, response, cosine, information, centres."""
    found = reproduce.measure(model, data, every=1)
    for layer, moe in enumerate(model.moe_layers()):
        tokens = [(kind, x) for kind, ids in DOCUMENTS for x in inputs_of_layers(model, [EOT, *ids])[layer]]
        agree = within = response = cosine = 0
        joint, groups = {}, {}
        for kind, x in tokens:
            scores = [float(row @ x) for row in moe.R]
            order = sorted(range(6), key=lambda i: -scores[i])
            lengths = [(x @ moe.W_g[j]).norm().item() for j in range(6)]
            best = lengths.index(max(lengths))
            agree += order[0] == best
            within += best in order[:2]
            response += lengths[order[0]] / (sum(lengths) / 6)
            cosine += float(x @ moe.R[order[0]]) / (x.norm() * moe.R[order[0]].norm()).item()
            joint[kind, order[0]] = joint.get((kind, order[0]), 0) + 1
            groups.setdefault(order[0], []).append(x)
        n = len(tokens)
        of_kind, of_expert = {}, {}
        for (kind, j), count in joint.items():
            of_kind[kind], of_expert[j] = of_kind.get(kind, 0) + count, of_expert.get(j, 0) + count
        bits = sum(c / n * math.log2(c * n / of_kind[kind] / of_expert[j]) for (kind, j), c in joint.items())
        centres = {j: torch.stack(group).mean(dim=0) for j, group in groups.items()}
        middle, row = torch.stack([x for _, x in tokens]).mean(dim=0), moe.R.mean(dim=0)
        relative = [torch.cosine_similarity(c - middle, moe.R[j] - row, dim=0).item() for j, c in centres.items()]
        common = middle.square().sum() / torch.stack([x for _, x in tokens]).square().sum(dim=1).mean()
        centre = sum(torch.cosine_similarity(c, moe.R[j], dim=0).item() for j, c in centres.items()) / len(centres)
        broken = sum(((centres[i] @ moe.W_g[j]).norm() > (centres[k] @ moe.W_g[k]).norm()).item()
                     for i in centres for j in centres for k in (i, j) if i != j)
        expected = dict(agreement=agree / n, within=within / n, response=response / n, cosine=cosine / n,
                        information=bits, centre=centre, centred=broken / (2 * len(centres) * (len(centres) - 1)),
                        relative=sum(relative) / len(centres), common=common.item())
        for name, value in expected.items():
            assert found[name][layer] == pytest.approx(value, abs=1e-4), f"{name} of layer {layer}"
        assert sum(map(sum, found["counts"][layer])) == n, "padding was counted, or tokens were lost"
    assert found["kinds"] == ["sums", "story"] or found["kinds"] == ["story", "sums"]


def test_what_is_measured_on_weights_equals_loops(model):
    """Loss with each kind of noise, cosines of router rows, cosines of neurons within and between experts."""
    found = reproduce.measure_weights(model, alpha=1.0)
    moe = model.moe_layers()[1]
    R, W_g = moe.R.detach().double(), moe.W_g.detach().double()
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()
    rows = [abs(cosine(R[i], R[j])) for i in range(6) for j in range(6) if i != j]
    pairs = {True: [], False: []}
    for i in range(6):
        for j in range(6):
            for a in range(8):
                for b in range(8):
                    if (i, a) != (j, b):
                        pairs[i == j].append(cosine(W_g[i, :, a], W_g[j, :, b]) ** 2)
    assert found["router_cosine"][1] == pytest.approx(sum(rows) / len(rows), rel=1e-4)
    assert found["neurons"][1] == pytest.approx([sum(p) / len(p) for p in (pairs[True], pairs[False])], rel=1e-4)
    for noise, name in (("none", "none"), ("expected", "expected")):
        loss = reproduce.train.erc_moe.erc_loss(moe.R, moe.W_g, 1.0, noise).item()
        assert found[name][1] == pytest.approx(loss, rel=1e-5), f"{name}: {found[name][1]}, erc_loss says {loss}"
    mean, sd = found["drawn"][1]
    assert abs(mean - found["none"][1]) < 0.2 * mean and 0 < sd < mean, f"draws {mean} ± {sd}, none {found['none'][1]}"


@pytest.mark.parametrize("suite, variant", [(s, v) for s in ("n16", "n64") for v in reproduce.SUITES[s].names])
def test_every_variant_starts_from_the_weights_of_plain(suite, variant):
    """Same seed: a parameter whose name and shape the plain model has, too, starts with the plain model's values."""
    plain = reproduce.initial_model(suite, "plain", 3).state_dict()
    its = reproduce.initial_model(suite, variant, 3).state_dict()
    shared = [name for name in its if name in plain and plain[name].shape == its[name].shape]
    different = [name for name in shared if not torch.equal(plain[name], its[name])]
    assert not different and len(shared) >= 20, f"{len(shared)} shared, of which differ: {different}"
    if reproduce.has_coupling(variant):
        assert len(shared) == len(plain) == len(its), f"{len(shared)} of {len(plain)} are the same"


def test_dense_is_as_large_as_what_a_token_uses():
    """Equal active parameters, but for the router; AoE has at most as many in all as plain, and 6 % less at most."""
    counts = {name: reproduce.initial_model("n16", name, 0).num_params() for name in ("plain", "dense", "aoe")}
    routers = 3 * (16 - 1) * 96
    assert counts["plain"][1] - counts["dense"][1] == routers, counts
    assert 0.94 * counts["plain"][0] <= counts["aoe"][0] <= counts["plain"][0], counts


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results folder with one file, of n16/plain, seed 0, that says what a run would say."""
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    (tmp_path / "n16").mkdir()
    log = [dict(step=800, val_ce=0.5)]
    result = dict(suite="n16", variant="plain", seed=0, log=log, settings=reproduce.settings_of("n16", "plain", 0),
                  watched=[], dtype="bfloat16", torch="2", floor=0.2)
    (tmp_path / "n16" / "plain-0.json").write_text(json.dumps(result), encoding="utf-8")
    return tmp_path / "n16"


@pytest.mark.parametrize("name, change, words", [
    ("plain-0", lambda r: r["settings"].update(steps=7), "another version: steps 7, now 800"),
    ("plain-0", lambda r: r["settings"].pop("lr"), "another version: lr None, now 0.004"),
    ("plain-0", lambda r: r.pop("settings"), "no result of reproduce.py"),
    ("plane-0", lambda r: None, "there is no variant 'plane'"),
])
def test_results_that_do_not_belong_here_are_named_and_kept(results, name, change, words):
    """Other settings, foreign files, unknown variants: one line with the name, and the file stays."""
    path = results / f"{name}.json"
    result = json.loads((results / "plain-0.json").read_text(encoding="utf-8"))
    change(result)
    path.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        reproduce.load(path)
    assert path.name in str(caught.value) and path.exists()


def test_unknown_variants_are_wrong_usage():
    """Exit 2, with the names that exist."""
    with pytest.raises(UserError, match="no variant 'n16/plane'; known are: n16/plain") as caught:
        reproduce.main(["n16/plane"])
    assert caught.value.code == 2


def test_an_interrupted_run_writes_no_result(results, monkeypatch, tmp_path):
    """Ctrl-C in the middle: exit 130, no file, and finished runs are not trained again."""
    monkeypatch.setattr(reproduce, "run", lambda *job: pytest.fail(f"{job} has a result"))
    monkeypatch.setattr(reproduce.Path, "exists", lambda path: True)
    monkeypatch.setattr(reproduce, "load", lambda path: {})
    assert reproduce.main(["n16/plain"]) == 0
    monkeypatch.undo()
    monkeypatch.setattr(train, "train", lambda *args, **more: dict(signal=2))
    monkeypatch.setattr(reproduce, "measure", lambda *args: {})
    monkeypatch.setattr(prepare_data, "load_data", lambda folder: None)
    with pytest.raises(UserError, match="run the same command again") as caught:
        reproduce.run("n16", "plain", 1)
    assert caught.value.code == 130 and not (results / "plain-1.json").exists()


@pytest.mark.parametrize("ce, verdict", [(0.69, "within the spread"), (0.71, "OUTSIDE OF the spread")])
def test_a_second_training_is_held_against_the_spread_of_seeds(results, monkeypatch, capsys, ce, verdict):
    """--again compares with the stored value: 0.5 and 0.6 over two seeds have sd 0.0707, and 2 sqrt(2) times that is
    0.2. With a single seed there is no spread, and that is said."""
    monkeypatch.setattr(reproduce, "run", lambda *job: dict(log=[dict(val_ce=ce)]))
    with pytest.raises(UserError, match="results of 1 seeds; --again needs two"):
        reproduce.again("n16", "plain", 0)
    result = json.loads((results / "plain-0.json").read_text(encoding="utf-8"))
    result |= dict(seed=1, settings=reproduce.settings_of("n16", "plain", 1), log=[dict(step=800, val_ce=0.6)])
    (results / "plain-1.json").write_text(json.dumps(result), encoding="utf-8")
    reproduce.again("n16", "plain", 0)
    printed = capsys.readouterr().out
    assert verdict in printed and "0.0707" in printed, printed


def test_results_that_cannot_be_compared_are_not(results, monkeypatch):
    """Runs in float32 and in bfloat16 do not stand in one table."""
    monkeypatch.setattr(report, "RESULTS", results.parent)
    assert report.Results().seeds("n16", "plain") == [0]
    result = json.loads((results / "plain-0.json").read_text(encoding="utf-8"))
    result |= dict(seed=1, settings=reproduce.settings_of("n16", "plain", 1), dtype="float32")
    (results / "plain-1.json").write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(UserError, match="results of n16 differ in dtype"):
        report.Results()


# ---- Tables ----------------------------------------------------------------------------------------------------------


def test_an_interval_is_students():
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.303."""
    assert report.interval([1.0, 2.0, 3.0], "{:.2f}") == "2.00 (-0.48 to 4.48)"
    assert report.mean_sd([1.0, 2.0, 3.0], "{:.1f}") == "2.0 ± 1.0"


@pytest.mark.parametrize("values, below, either", [
    ([-0.02, -0.021, -0.022], "seen", "seen"), ([0.02, 0.021, 0.022], "contradicted", "seen"),
    ([-0.001, 0.001, 0.002], "not seen at this scale", "not seen at this scale"),
])
def test_a_verdict_is_what_the_interval_says(values, below, either):
    """"Smaller" needs an interval below 0, and above 0 it is contradicted; "different" needs one without 0."""
    low, high = report.bounds(values)
    assert report.verdict_of(values, -1) == below, f"{low:.4f} to {high:.4f}"
    assert report.verdict_of(values, None) == either, f"{low:.4f} to {high:.4f}"


def made_results(**val_ce):
    """Results with these val_ce, a list over seeds."""
    results = report.Results.__new__(report.Results)
    results.missing = []
    for variant, values in val_ce.items():
        for seed, value in enumerate(values):
            results["n16", variant.replace("_", "-"), seed] = dict(log=[dict(val_ce=value)], watched=[])
    return results


def test_differences_are_taken_seed_by_seed_and_between_runs_of_one_length():
    """Only seeds that both have; a run of half the length is compared with a plain one of half the length."""
    results = made_results(plain=[1.0, 2.0, 3.0], plain_half=[4.0], dense=[1.5, 2.75], probe_up=[4.25, 9.0])
    of = report.last("val_ce")
    assert results.paired("n16", "dense", of) == [0.5, 0.75]
    assert results.paired("n16", "probe-up", of) == [0.25]


def test_tables_go_below_their_marks_and_nowhere_else():
    """What stands below a mark, up to the empty line, is replaced; the rest stays to the letter."""
    old = "before\n\n<!-- table: noise -->\n| old |\n|---|\n\nafter | a |\n"
    new = report.filled(old, made_results())
    assert new.startswith("before\n\n<!-- table: noise -->\n| trained with |"), new
    assert new.endswith("|\n\nafter | a |\n"), new

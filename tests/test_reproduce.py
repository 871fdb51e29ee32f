"""The comparison: every variant starts from the same weights, what is measured equals loops, no result is lost."""

import itertools
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import report
import reproduce
import torch
import torch.nn.functional as F

import prepare_data
import train
from erc_moe import MoEConfig, MoETransformer
from prepare_data import UserError


def test_what_is_measured_in_the_weights_equals_loops():
    """Table 2, the smallest alpha, norms, and cosines of rows and of gate columns, number by number."""
    torch.manual_seed(0)
    model, n = MoETransformer(MoEConfig(16, 8, 2, 2, 16, 8, 6, 2)), 6
    model.moe_layers()[1].R.data[0] /= 10  # so that constraints are broken at alpha 5, too
    found, moe = reproduce.measure(model, alpha=1.0), model.moe_layers()[1]
    R, W_g, others = moe.R.detach().double(), moe.W_g.detach().double(), [*itertools.permutations(range(n), 2)]
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()
    M, norms = [[(row @ W).norm().item() for W in W_g] for row in R], torch.stack([row.norm() for row in R])
    columns = itertools.permutations([(j, column) for j in range(n) for column in W_g[j].T], 2)
    squares = [(i == j, cosine(a, b) ** 2) for (i, a), (j, b) in columns]
    within, between = (statistics.mean(square for same, square in squares if same == which) for which in (True, False))
    for name, value in dict(
            loss=[sum(max(M[i][j] - a * M[i][i], 0) + max(M[j][i] - a * M[i][i], 0) for i, j in others) / n**2
                  for a in (1, 2, 3, 4, 5)],
            smallest_alpha=max(max(M[i][j], M[j][i]) / M[i][i] for i, j in others),
            norm_R=[norms.mean().item(), norms.std().item()],
            cosine=statistics.mean(abs(cosine(R[i], R[j])) for i, j in others), neurons=within / between).items():
        assert found[name][1] == pytest.approx(value, rel=1e-4, abs=1e-7), f"{name}: {found[name][1]}, loops {value}"


def test_the_premise_equals_whole_models_with_another_route():
    """Every expert put first, in the last layer of a whole model, token by token. Of 22 tokens 5 are hard."""
    torch.manual_seed(0)
    model = MoETransformer(MoEConfig(16, 8, 2, 2, 16, 8, n_experts=5, top_k=3, init_std=0.5))
    moe, route, seen = model.moe_layers()[-1], model.moe_layers()[-1].route, []
    inputs, targets = torch.randint(16, (2, 3, 8))
    targets[0, 6:] = -100

    def token_ce(first=None):
        def forced(x):
            logits, probs, weights, experts = route(x)
            rows = [[first, *[i for i in row.tolist() if i != first][:2]] for row in logits.argsort(descending=True)]
            return logits, probs, weights, experts if first is None else torch.tensor(rows)
        moe.route = lambda x: seen.append(x) or forced(x)
        return F.cross_entropy(model(inputs).logits.transpose(1, 2), targets, reduction="none")[targets >= 0].tolist()

    router, trials, rows = token_ce(), [token_ce(j) for j in range(5)], []
    moe.route = route
    for t, x in enumerate(seen[0][targets.flatten() >= 0]):
        ce = [trial[t] for trial in trials]
        strongest = max(range(5), key=lambda j: (x @ moe.W_g[j]).norm().item())
        rows.append(dict(router=router[t], response=ce[strongest], random=sum(ce) / 5, best=min(ce),
                         router_best=(x @ moe.R.T).argmax().item() == ce.index(min(ce)),
                         response_best=strongest == ce.index(min(ce))))
    xs, states, wanted = reproduce.validation(model, [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])], "cpu")
    found = reproduce.premise(model, xs[-1], states, wanted)
    assert len(rows) == 22 and len({row["response"] == row["router"] for row in rows}) == 2, "a poor example"
    for which, its in (("all", rows), ("hard", sorted(rows, key=lambda row: -row["router"])[:5])):
        expected = {name: sum(row[name] for row in its) / len(its) for name in its[0]}
        assert found[which] == pytest.approx(expected, abs=1e-5), f"{which}: {found}, {expected}"


def test_rows_are_compared_with_the_mean_of_their_tokens():
    """Tokens that lie on the axes, rows that point there: cosine 1 with one's own, less with a sample of all."""
    model = MoETransformer(MoEConfig(16, 8, 1, 1, 8, 8, n_experts=4, top_k=1))
    model.moe_layers()[0].R.data = torch.eye(8)[:4] * 3
    found = reproduce.centres(model, [torch.eye(8)[:3].repeat(50, 1)])  # the last expert gets no token
    assert found["own"] == pytest.approx([1.0]), found
    assert found["random"] == pytest.approx([3**-0.5], abs=0.05), f"{found}; of a mean of all tokens 1 / sqrt(3)"


def test_copies_and_other_tokens_are_averaged_apart(monkeypatch):
    """Two documents, the shorter one first as in validation_batches; other text than the demo's is refused."""
    monkeypatch.setattr(prepare_data, "demo_documents", lambda: iter(
        [("count", "\4", 0.0, [])] * 5 + [("recipe", "\1\2", 0.0, [(1, 2)]), ("story", "\3", 0.0, [])] * 160))
    model = SimpleNamespace(norm=lambda x: x, head=lambda x: x)
    targets = torch.tensor([3, 256] * 160 + [1, 2, 256] * 160)
    states = torch.randn(800, 257, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    ce = [-states[t].log_softmax(dim=0)[targets[t]].item() for t in range(800)]
    copied = ce[321::3]
    assert reproduce.copies(model, states, targets) == pytest.approx(dict(
        ce_copies=sum(copied) / 160, ce_other=(sum(ce) - sum(copied)) / 640, copies=160, others=640))
    with pytest.raises(UserError, match="prepare it again"):
        reproduce.copies(model, states, targets.flip(0))


def test_the_decay_makes_the_timescale():
    """Sum over all steps of lr * decay, by a loop: 3.7 where the suite is named for its size, else as it is named."""
    for suite, expected in (("n16", 3.7), ("n64", 3.7), ("text", 3.7), ("n16-slow", 0.175), ("n16-18", 18)):
        config = reproduce.configs(suite, "plain", 0)[0]
        rates = [step / config.warmup if step < config.warmup else 0.55 + 0.45 * math.cos(
            math.pi * (step - config.warmup) / (config.steps - config.warmup)) for step in range(1, config.steps + 1)]
        total = sum(rates) * config.lr * config.moe_weight_decay
        assert total == pytest.approx(expected, rel=2e-3), f"{suite}: {total}"


@pytest.mark.parametrize("suite, variant", [(s, v) for s in reproduce.SUITES for v in reproduce.SUITES[s].variants])
def test_every_variant_starts_from_the_weights_of_plain(suite, variant):
    """Same seed: a parameter whose name and shape the plain model has, too, starts with the plain model's values."""
    plain, its = (reproduce.initial_model(suite, name, 3).state_dict() for name in ("plain", variant))
    shared = [name for name in its if name in plain and plain[name].shape == its[name].shape]
    different = [name for name in shared if not torch.equal(plain[name], its[name])]
    assert not different and len(shared) >= 20, f"{len(shared)} shared, of which differ: {different}"


@pytest.mark.usefixtures("elsewhere")
def test_a_run_leaves_a_result_that_can_be_loaded(data, monkeypatch, tmp_path):
    """Four steps: log, weights before and after, settings; it is not run again; an interrupted one leaves none."""
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    suite = reproduce.SUITES["n16"]
    monkeypatch.setitem(reproduce.SUITES, "n16", reproduce.Suite(
        suite.moe, dict(suite.settings, data=data, steps=4, eval_every=2), {"erc-1": 1, "plain": 1}))
    assert reproduce.main(["n16/erc-1"]) == 0
    result = reproduce.load(tmp_path / "n16" / "erc-1-0.json")
    end, premise = result["log"][-1], result["premise"]["all"]
    assert [one["step"] for one in result["weights"]] == [0, 2, 4] and "M" in result["weights"][-1]
    assert (premise["router"], premise["response"]) == pytest.approx((end["val_ce"], end["response_ce"]), abs=1e-4), end
    monkeypatch.setattr(train, "train", lambda *args, **more: dict(signal=2))
    assert reproduce.main(["n16/erc-1"]) == 0, "it has a result already"
    with pytest.raises(UserError, match="run the same command again"):
        reproduce.main(["n16/plain"])
    assert [path.name for path in (tmp_path / "n16").iterdir()] == ["erc-1-0.json"]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a result of n16/plain into a folder of results."""
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "n16").mkdir()
    return lambda seed, val_ce, **changes: (tmp_path / "n16" / f"plain-{seed}.json").write_text(json.dumps(dict(
        suite="n16", variant="plain", seed=seed, log=[dict(step=800, val_ce=val_ce)], weights=[], torch="2", data="d",
        settings=reproduce.settings_of("n16", "plain", seed), dtype="float32") | changes), encoding="utf-8")


def test_results_that_do_not_belong_here_are_named(write):
    """Other settings and foreign files: one line with the name. Two types do not stand in one table."""
    settings = reproduce.settings_of("n16", "plain", 1)
    write(0, 0.5)
    for changes, words in ((dict(settings=settings | dict(steps=7)), "1.json is of another version: steps 7"),
                           (dict(settings=None), "1.json is no result"), (dict(dtype="bfloat16"), "n16 .*dtype")):
        write(1, 0.6, **changes)
        with pytest.raises(UserError, match=words):
            report.Results()


def test_a_second_training_is_compared_with_the_spread_of_seeds(write, monkeypatch, capsys):
    """0.5 and 0.6 over two seeds have sd 0.0707, and 2 sqrt(2) times that is 0.2."""
    write(0, 0.5), write(1, 0.6)
    for ce, verdict in ((0.69, "0.0707: within the spread"), (0.71, "0.0707: OUTSIDE OF the spread")):
        monkeypatch.setattr(reproduce, "run", lambda *job, ce=ce: dict(log=[dict(val_ce=ce)]))
        reproduce.again("n16", "plain", 0)
        assert verdict in (printed := capsys.readouterr().out), printed

"""Techniques through a search: the space and the recipe say which."""

from pathlib import Path

from autocompress.config import load_profile
from autocompress.core.recipe import Plan, Prune, Quantize, Stage, Train
from autocompress.core.space import LayerRule, SpaceRules, WidthRule
from autocompress.driver import search
from autocompress.run import Run
from autocompress.tasks import digits

GATED = Plan(
    name="gated",
    stages=(
        Stage(name="cut", prune=Prune(reconstruct=True), train=Train(share=0.5), gate=0.0, cycles=2),
        Stage(name="bits", quantize=Quantize(aware=True), train=Train(share=0.5)),
    ),
)
SPACE = SpaceRules(
    name="many",
    description="a choice of each kind",
    precision_by="model",
    layers=(LayerRule(precisions=("k4a32", "w4a8"), sparsities=("block 0.5",)), LayerRule(name="fc", ranks=(1.0, 0.5))),
    widths=(WidthRule(ratios=(0.25,)),),
    skip=("*",),
    recipes=(Plan(name="default"), GATED),
)


def found(quick_profile: Path, out: Path) -> Run:
    return search(
        digits.task(),
        load_profile(str(quick_profile)),
        space=SPACE,
        trials=5,
        fidelity="recover",
        recover_steps=8,
        out=out,
    )


def test_a_search_tries_what_space_and_recipes_say(quick_profile: Path, tmp_path: Path) -> None:
    run = found(quick_profile, tmp_path / "run")
    tried = [t for t in run.trials() if t.role == "candidate"]
    assert all(t.score is not None for t in tried)
    names = {t.candidate.recipe.name for t in tried}
    assert names <= {"default", "gated"}
    assert any(c.levels == "kmeans" for t in tried for c in t.candidate.layers.values())
    undone = [note for t in tried for note in t.notes]
    assert all(note.startswith("stage 'cut'") for note in undone)

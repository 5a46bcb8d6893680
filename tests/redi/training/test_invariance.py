"""A step's loss and gradient do not depend on how it is split, against stored trajectories.

`python tests/tools/trajectories.py` prints the table; with --write it stores the numbers anew.
"""

import pytest
import trajectories
import yaml

# Measured: up to 6e-7 after six steps. A denominator counted per pack or per rank is off by 1e-2.
ROUNDING = 1e-5


def assert_stored(folder, objective):
    got, want = trajectories.trajectory(folder), trajectories.stored()[objective]
    assert trajectories.distance(got, want) < ROUNDING


@pytest.mark.parametrize("split", trajectories.SPLITS)
@pytest.mark.parametrize("objective", trajectories.OBJECTIVES)
def test_any_split_has_the_stored_trajectory(tmp_path, objective, split):
    sizes = trajectories.run(tmp_path, objective, split)
    assert_stored(tmp_path, objective)
    unit = 2 if objective in ("dpo", "simpo") else 1
    if split == "one pack":
        assert {len(packs) for packs in sizes} == {1}
    elif split == "one at a time":
        assert {size for packs in sizes for size in packs} == {unit}
    elif objective != "sft":  # chosen traces alone fill too little
        assert any(len(set(packs)) > 1 for packs in sizes)


def test_two_ranks(tmp_path):
    """FSDP2 with tied embeddings and clipped gradients, on steps that leave a rank short of packs;
    the weights too are those of one process."""
    from safetensors.torch import load_file

    trajectories.prepare(tmp_path)
    trajectories.launch(2, trajectories.__file__, "--into", str(tmp_path), "redi", "dpo")
    for objective in ("redi", "dpo"):
        assert_stored(tmp_path / objective, objective)
        norms = [norm for _, norm in trajectories.stored()[objective]]
        assert min(norms) < 1 < max(norms)  # max_grad_norm is 1
        trajectories.run(tmp_path / "alone" / objective, objective, "uneven packs")
        both = [
            load_file(folder / objective / "out" / "model.safetensors")
            for folder in (tmp_path, tmp_path / "alone")
        ]
        two, one = both
        assert two.keys() == one.keys() and "lm_head.weight" not in one  # tied
        for name, weight in one.items():
            # AdamW moves a weight by up to its rate, 1e-3, where the gradient is mere rounding.
            assert (two[name] - weight).abs().max() < 2e-3
            assert (two[name] - weight).norm() < 1e-4 * weight.norm()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("objective", trajectories.OBJECTIVES)
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_the_command_on_ranks(tmp_path, objective, num_ranks, checkpointing):
    """The real command line; budgets of one trace (pair) leave ranks short at four ranks."""
    recipe = tmp_path / "recipe.yaml"
    changes = {"max_tokens_per_batch": 40, "gradient_checkpointing": checkpointing}
    recipe.write_text(yaml.safe_dump(trajectories.settings(tmp_path, objective, **changes)))
    trajectories.launch(num_ranks, "-m", "redi", "train", "--config", str(recipe))
    assert_stored(tmp_path, objective)


def test_distance_sees_a_difference():
    want = trajectories.stored()["redi"]
    assert trajectories.distance(want, want) == 0
    assert trajectories.distance([[x + 1e-4, y] for x, y in want], want) > ROUNDING

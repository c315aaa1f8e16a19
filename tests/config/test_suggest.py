from torchrecipes.config.suggest import closest, did_you_mean


def test_the_nearest_name_wins_whatever_the_case_and_the_dashes():
    keys = ["rows_per_step", "rows_per_micro_batch", "max_steps", "lr"]
    assert closest("rows_per_stpe", keys) == "rows_per_step"
    assert closest("rows-per-micro-batch", keys) == "rows_per_micro_batch"
    assert closest("Max_Steps", keys) == "max_steps"
    assert closest("lrr", keys) == "lr"
    assert closest("banana", keys) is None


def test_without_a_near_name_all_are_listed():
    assert did_you_mean("banana", ["seed", "lr"], "the keys are") == "the keys are: lr, seed"
    assert did_you_mean("banana", [], "it takes") == "it takes: nothing"
    assert did_you_mean("x", [f"key{n}" for n in range(60)]).endswith(", ...")

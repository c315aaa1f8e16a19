from torchrecipes.config.suggest import closest, did_you_mean


def test_the_nearest_name_is_found_whatever_the_case_and_the_dashes():
    keys = ["global_batch_size", "micro_batch_size", "max_steps", "lr"]
    assert closest("global_batch_szie", keys) == "global_batch_size"
    assert closest("micro-batch-szie", keys) == "micro_batch_size"
    assert closest("Max_Steps", keys) == "max_steps"
    assert closest("lrr", keys) == "lr"
    assert closest("banana", keys) is None


def test_without_a_near_name_all_names_are_listed():
    assert did_you_mean("banana", ["seed", "lr"], "the keys are") == "the keys are: lr, seed"
    assert did_you_mean("banana", [], "it takes") == "it takes: nothing"
    assert did_you_mean("x", [f"key{n}" for n in range(60)]).endswith(", ...")

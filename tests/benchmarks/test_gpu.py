"""`benchmarks/gpu.py`: all of it runs on a CPU with tiny shapes; kinds of kernels; a case that fails, hangs or dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"
PARTS = ("ceilings", "loss", "attention", "train", "peers", "float8", "muon")


@pytest.fixture(autouse=True)
def modules_of_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def run_tiny(folder, **environment):
    """The output and the JSON file of a run with tiny shapes."""
    command = [sys.executable, str(FOLDER / "gpu.py"), "--tiny", "--json", "figures.json"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads((folder / "figures.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return run_tiny(tmp_path_factory.mktemp("gpu"), CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_on_a_gpu_every_part_runs_compiled(tmp_path):
    _, content = run_tiny(tmp_path)
    rows = content["rows"]
    assert {row["part"] for row in rows} == set(PARTS) and content["restarts"] == 0
    assert [row for row in rows if "error" in row or "failure" in row] == []
    assert all(row["error_to_float64"] < 0.02 for row in rows if row["part"] == "attention")
    assert all(row["recompiled"] == 0 for row in rows if row["part"] == "train" and "recompiled" in row)


def test_every_part_has_rows_and_no_case_fails_or_is_left_out(tiny):
    _, content = tiny
    assert {row["part"] for row in content["rows"]} == set(PARTS)
    assert [row for row in content["rows"] if "error" in row or "failure" in row or "profile_error" in row] == []
    assert content["left_out"] == [] and content["restarts"] == 0
    for key in ("date", "device", "torch", "command", "commit", "seconds"):
        assert key in content
    assert "--tiny" in content["command"]


def test_the_librarys_choice_is_marked_once_per_batch_and_agrees_with_float64(tiny):
    cases = {}
    for row in tiny[1]["rows"]:
        if row["part"] == "attention":
            cases.setdefault((row["case"], row["documents"]), []).append(row)
    assert {documents for _, documents in cases} == {"lines", "web", "dense"} and len(cases) == 12
    for rows in cases.values():
        assert [row["chosen"] for row in rows].count(True) == 1
        assert "flex" in [row["backend"] for row in rows]
        assert all(row["forward_ms"] > 0 and row["error_to_float64"] < 0.02 for row in rows)
        (chosen,) = (row["backend"] for row in rows if row["chosen"])
        assert chosen == ("tiled" if rows[0]["causal"] else "math")  # of the CPU


def test_training_has_speed_and_shares_that_add_up(tiny):
    rows = [row for row in tiny[1]["rows"] if "tokens_per_second" in row]
    assert {row["part"] for row in rows} == {"train", "peers", "float8"}
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["micro_batch_ms"] > 0 and row["update_ms"] > 0
        assert 99 < sum(row["shares"].values()) < 101 and row["shares"]["products"] > 0
        assert row["loss"] > 0 and row["kernels"]["training"] and row["kernels"]["update"]
    names = [row["case"] for row in rows if row["part"] == "train"]
    for model in ("neobert/base", "llama 700m", "gpt2/750m", "qwen3/0_6b", "moe/500m"):
        assert f"{model}, compiled" in names
    agreement = next(row for row in tiny[1]["rows"] if "difference" in row)
    assert len(agreement["losses"]["bf16"]) == len(agreement["losses"]["fp32"]) == agreement["steps"]


def test_the_report_has_a_table_for_every_part(tiny):
    output = tiny[0]
    report = output[output.index("Measured on") :]
    for part in PARTS:
        table = report[report.index(f"### {part}\n") :].splitlines()[2:]
        width = table[0].count("|")
        assert width > 2 and table[1].count("---") == width - 1 and table[2].count("|") == width
    assert "**" in report[report.index("### attention") :]
    assert "failed" not in report.replace("### failed or left out", "")


KERNELS = {
    "attention": """
        void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::bfloat16_t>>
        void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, cutlass::half_t>>
        void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64>>
        void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<64>>
        cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64x64_cga1x1x1_kernel0_0
        void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, float, 128, 64>
        fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)
        triton_tem_fused_flex_attention_0
        triton_tem_fused_flex_attention_backward_12
        triton_red_fused_flex_attention_backward_mul_sum_3
        kernel_cutlass_kernel_flash_attn_cute_flash_fwd_FlashAttentionForwardSm90_object_at_0x7f
    """,
    "products": """
        nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT
        nvjet_sm90_tst_mma_192x192x64_4_64x48x64_cta_pairs
        nvjet_qqtst_128x256_128x4_2x1_v_bz_TNT
        sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel
        void cutlass::Kernel2<cutlass_75_tensorop_bf16_s1688gemm_bf16_128x128_nn_align1>
        void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>>>
        ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nn
        void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>
        triton_tem_fused_addmm_4
        triton_tem_fused__to_copy_mm_t_7
        void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128>
    """,
    "grouped products": """
        void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::GroupProblemShape<C>>>
        void at::cuda::detail::prepare_grouped_gemm_data<cutlass::bfloat16_t, cutlass::bfloat16_t, float>
        triton_tem_fused__grouped_mm_2
    """,
    "norms and elementwise": """
        triton_poi_fused__to_copy_mul_silu_3
        triton_poi_fused__scaled_dot_product_flash_attention_backward_cat_11
        triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0
        triton_per_fused__fused_rms_norm_5
        void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3>>
        void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>
        void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>
        void (anonymous namespace)::softmax_warp_forward<float, float, float, 3, false, false>
    """,
    "optimizer": """
        void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>
        void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNorm>
    """,
    "copies": """
        Memcpy HtoD (Pageable -> Device)
        Memcpy DtoD (Device -> Device)
        Memset (Device)
        void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>
        void at::native::unrolled_elementwise_kernel<at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>
        void at::native::(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<16>
    """,
    "other": """
        void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long, unsigned int, 2, 2, -2, true>
        void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<at_cuda_detail::cub::DeviceRadixSortPolicy<long, long>>
    """,
}


@pytest.mark.parametrize("kind", KERNELS)
def test_kinds_of_kernels(kind):
    from gpu_kernels import KINDS, kind_of

    assert list(KERNELS) == [name for name in KERNELS if name in KINDS] and len(KERNELS) == len(KINDS)
    names = [line.strip() for line in KERNELS[kind].splitlines() if line.strip()]
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)


def test_what_the_update_runs_counts_as_optimizer():
    from gpu_kernels import shares

    found = shares({"nvjet_tst": (6.0, 2), "Memset (Device)": (2.0, 1)}, {"nvjet_tst": (1.5, 5), "Memset": (0.5, 1)})
    assert found["products"] == 60 and found["copies"] == 20 and found["optimizer"] == 20


def test_documents_are_as_long_as_those_of_web_text_and_end_with_their_row():
    from gpu_corpus import document_lengths, row_boundaries

    lengths = document_lengths("web", 2_000_000)
    assert 350 < lengths.mean() < 450 and lengths.min() >= 4
    lengths = document_lengths("lines", 100_000)
    assert lengths.min() >= 4 and lengths.max() <= 40
    starts = row_boundaries("lines", 8, 64)
    assert set(range(0, 512, 64)) < set(starts.tolist()) and (starts < 512).all()


def test_the_report_names_a_faster_backend_and_marks_wrong_results():
    from gpu_report import report

    case = {
        "part": "attention",
        "case": "x",
        "row_len": 1024,
        "heads": "12/12 x 64",
        "causal": False,
        "documents": "web",
    }
    speeds = {"flex": (0.5, 1.0, 0.003), "varlen": (0.3, 0.9, float("nan")), "sdpa efficient": (None, None, None)}
    rows = [
        {
            **case,
            "backend": name,
            "chosen": name == "flex",
            "forward_ms": a,
            "backward_ms": b,
            "error_to_float64": error,
        }
        for name, (a, b, error) in speeds.items()
    ]
    text = report(content(rows=rows))
    assert "| **0.50 / 1.00** | 0.30 / 0.90 wrong (nan) | failed |" in text
    assert "varlen takes 0.80 of the time of flex" in text


def test_a_row_that_lacks_figures_costs_its_table_only():
    from gpu_report import report

    rows = [
        {"part": "muon", "case": "x"},
        {"part": "ceilings", "case": "copy", "bytes": 2**30, "gigabytes_per_second": 3e3},
    ]
    text = report(content(rows=rows))
    assert "3,000 GB/s" in text and "KeyError" in text[text.index("### muon") :]


def content(**changes):
    empty = {"running": None, "restarts": 0, "seconds": {}, "notes": [], "left_out": [], "rows": []}
    about = {"date": "", "device": "", "torch": "", "commit": "", "command": "", "started": 0.0, "minutes": 1e9}
    return {**about, **empty, **changes}


def make_bench(tmp_path, **changes):
    from gpu_bench import Bench

    bench = Bench(torch.device("cpu"), True, tmp_path / "figures.json", tmp_path, content(**changes))
    bench.begin("loss", 0.0, 0.5)
    return bench


def test_a_case_that_fails_is_kept_and_the_next_one_runs(tmp_path, capsys):
    from gpu_report import report

    def fails(bench):
        bench.add(variant="first", ms=1.0, extra_gib=0.0)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    bench = make_bench(tmp_path)
    bench.run("a", fails)
    bench.run("b", lambda bench: bench.add(variant="second", ms=2.0, extra_gib=0.0))
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["case"], row.get("ms")) for row in kept["rows"]] == [("a", 1.0), ("a", None), ("b", 2.0)]
    assert kept["rows"][1]["error"].startswith("out of memory") and kept["running"] is None
    assert "out of memory" in capsys.readouterr().out
    assert "- loss, a: failed, out of memory" in report(kept)


def test_no_case_starts_after_the_parts_time_and_none_runs_twice(tmp_path):
    from gpu_report import report

    bench = make_bench(tmp_path, rows=[{"part": "loss", "case": "done before", "error": "failed before"}])
    ran = []
    bench.run("done before", ran.append)
    bench.deadline = 0.0
    bench.run("late", ran.append)
    assert ran == [] and bench.content["left_out"] == [["loss", "late"]]
    assert "- loss, late: left out" in report(bench.content)


@pytest.mark.parametrize(
    ("ending", "expected"),
    [("os._exit(3)", "exit code 3"), ("time.sleep(1000)", "too long"), ("os._exit(75)", None)],
    ids=["dies", "hangs", "lost its GPU"],
)
def test_a_process_that_ends_is_started_again_without_its_case(tmp_path, ending, expected):
    """The first process stops in its case `bad`; the second one finds it among the rows."""
    from gpu_supervise import read_json, supervise, write_json

    path, script = tmp_path / "figures.json", tmp_path / "script.py"
    write_json(path, content())
    running = "None" if expected is None else "{'part': 'loss', 'case': 'bad', 'since': time.time()}"
    script.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(FOLDER)!r})\n"
        "from pathlib import Path\nfrom gpu_supervise import read_json, write_json\n"
        f"path = Path({str(path)!r})\ncontent = read_json(path)\n"
        "if content['restarts']:\n"
        "    content['rows'].append({'part': 'loss', 'case': 'good'})\n    write_json(path, content)\n    sys.exit()\n"
        f"content['running'] = {running}\nwrite_json(path, content)\n{ending}\n"
    )
    assert supervise(path, [sys.executable, str(script)], dict(os.environ), 1.0) == 0
    kept = read_json(path)
    assert kept["restarts"] == 1 and kept["rows"][-1]["case"] == "good" and kept["running"] is None
    errors = [row["error"] for row in kept["rows"] if row["case"] == "bad"]
    assert len(errors) == (expected is not None) and all(expected in error for error in errors)

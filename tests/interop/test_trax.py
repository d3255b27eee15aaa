"""Import of Trax's files: no code is executed, and every weight is mapped correctly."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from reformer_dist.errors import CheckpointError
from reformer_dist.interop import trax
from reformer_dist.interop.pickles import read_pickle
from reformer_dist.models import ReformerLM

SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "d_model": 12,
    "d_ff": 20,
    "d_attention_key": 6,
    "d_attention_value": 6,
    "n_layers": 2,
    "n_heads": 2,
    "max_len": 64,
    "attention_type": ["@trax.layers.SelfAttention", "@trax.layers.LSHSelfAttention"],
    "pos_axial_shape": [4, 16],
    "pos_d_axial_embs": [4, 8],
    "ff_activation": "Relu",
    "SelfAttention.chunk_len": 8,
    "SelfAttention.n_chunks_before": 1,
    "LSHSelfAttention.chunk_len": 8,
    "LSHSelfAttention.n_buckets": [4, 2],
    "LSHSelfAttention.n_hashes": 2,
}


def flat_weights(options: dict[str, Any], seed: int = 0) -> list[NDArray[Any]]:
    """Random weights in the order in which Trax flattens those of a ReformerLM."""
    draw = np.random.default_rng(seed)
    d, ff, heads, size = (options[key] for key in ("d_model", "d_ff", "n_heads", "d_attention_key"))
    shapes: list[tuple[int, ...]] = [(options["vocab_size"], d), (1, 4, 1, 4), (1, 1, 16, 8)]
    for layer in range(options["n_layers"]):
        is_lsh = layer % 2 == 1
        shapes += [(d,), (d,), *[(heads, d, size)] * (2 if is_lsh else 3), (heads, size, d)]
        shapes += [(d,), (d,), (d, ff), (ff,), (ff, d), (d,)]
    shapes += [(2 * d,), (2 * d,), (2 * d, options["vocab_size"]), (options["vocab_size"],)]
    return [draw.normal(size=shape).astype(np.float32) for shape in shapes]


def nested(flat: list[NDArray[Any]]) -> Any:
    """The same weights as older versions nest them: in tuples, empty for layers without weights."""
    return ((), flat[0], [tuple(flat[1:3]), ()], (), [tuple(flat[3:9]), (tuple(flat[9:]), ())])


def write(folder: Path, **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALL | options))


def write_pickle(folder: Path, value: Any, protocol: int = pickle.HIGHEST_PROTOCOL) -> None:
    (folder / "model.pkl.gz").write_bytes(gzip.compress(pickle.dumps(value, protocol=protocol)))


def write_arrays(folder: Path, arrays: list[NDArray[Any]]) -> None:
    file = io.BytesIO()
    for array in arrays:
        np.save(file, array, allow_pickle=False)
    (folder / "model.weights.npy.gz").write_bytes(gzip.compress(file.getvalue()))


def complains(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        trax.read(folder)
    for word in words:
        assert word in str(caught.value)


def test_all_ways_of_saving_give_the_same_weights(tmp_path: Path) -> None:
    write(tmp_path)
    flat = flat_weights(SMALL)
    beside = {"step": 3, "history": OrderedDict(loss=[(1, 2.5)]), "flat_state": [np.zeros(3, dtype=np.int32)]}
    found = []
    for protocol in range(6):
        write_pickle(tmp_path, {"flat_weights": flat, **beside}, protocol)
        found.append(trax.read(tmp_path).weights)
        write_pickle(tmp_path, {"weights": nested(flat), **beside}, protocol)
        found.append(trax.read(tmp_path).weights)
    write_pickle(tmp_path, {"flat_weights": 2, "slots_per_task": 2, **beside})
    write_arrays(tmp_path, flat)
    found.append(trax.read(tmp_path).weights)
    for weights in found:
        assert weights.keys() == found[0].keys()
        assert all(torch.equal(weights[name], found[0][name]) for name in weights)


def test_every_weight_is_mapped_correctly(tmp_path: Path) -> None:
    """Against the formulas of Trax's layers, head by head and array by array."""
    write(tmp_path)
    flat = flat_weights(SMALL)
    write_arrays(tmp_path, flat)
    found = trax.read(tmp_path)
    model = ReformerLM(found.config, found.vocab_size).eval()
    model.load_state_dict(found.weights)
    x = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)
    local, lsh = model.stack.blocks[0].attention, model.stack.blocks[1].attention

    def agrees(layer: torch.nn.Linear, of_heads: NDArray[Any]) -> None:
        right = np.concatenate([x @ head for head in of_heads], axis=-1)
        assert np.allclose(layer(torch.from_numpy(x)).detach(), right, atol=1e-5)

    agrees(local.to_q, flat[5])
    agrees(local.to_k, flat[6])
    agrees(local.to_v, flat[7])
    agrees(lsh.to_q, flat[17])
    agrees(lsh.to_v, flat[18])
    out = np.random.default_rng(2).normal(size=(5, 2, 6)).astype(np.float32)
    right = sum(out[:, head] @ flat[8][head] for head in range(2))
    assert np.allclose(local.to_out(torch.from_numpy(out).flatten(1)).detach(), right, atol=1e-5)
    feed = model.stack.blocks[1].feed_forward
    right = np.maximum(x @ flat[22] + flat[23], 0) @ flat[24] + flat[25]
    with torch.no_grad():
        assert np.allclose(feed.to_out(feed.to_inner(torch.from_numpy(x)).relu()), right, atol=1e-5)
    positions = model.embedding.positions(torch.tensor([0, 17, 63])).detach().numpy()
    assert np.array_equal(positions[1], np.concatenate([flat[1][0, 1, 0], flat[2][0, 0, 1]]))
    assert torch.equal(model.stack.norm.weight, torch.from_numpy(flat[-4]))
    assert torch.equal(model.head.weight, torch.from_numpy(flat[-2]).T)
    config = found.config
    assert (config.norm_eps, config.is_concat, config.compat.chunk_wrap, config.qk_scale) == (
        1e-6,
        True,
        True,
        1.0,
    )
    assert [kind.name for kind in config.layers] == ["local", "lsh"]
    assert model(torch.zeros(1, 40, dtype=torch.int64)).isfinite().all()


def test_a_model_of_trax_is_one_of_hugging_face(tmp_path: Path) -> None:
    """Hugging Face's published weights were converted from Trax, so both conversions must agree."""
    from reformer_dist.interop.to_hugging_face import model_files

    write(tmp_path)
    flat = flat_weights(SMALL)
    write_arrays(tmp_path, flat)
    found = trax.read(tmp_path)
    options, tensors = model_files(found.config, found.weights, found.vocab_size)
    assert options["num_buckets"] == [4, 2] and options["attn_layers"] == ["local", "lsh"]
    layer = "reformer.encoder.layers.1.attention"
    # as in transformers' own converter: concatenated heads, transposed
    right = torch.from_numpy(flat[17]).transpose(1, 2).reshape(-1, 12)
    assert torch.equal(tensors[f"{layer}.self_attention.query_key.weight"], right)
    assert torch.equal(tensors[f"{layer}.output.dense.weight"], torch.from_numpy(flat[19]).reshape(-1, 12).T)


def test_other_positions_activations_and_layers(tmp_path: Path) -> None:
    changed = {"pos_axial_shape": [], "ff_activation": "FastGelu", "SelfAttention.chunk_len": None}
    write(tmp_path, **changed, **{"LSHSelfAttention.n_buckets": None})
    flat = flat_weights(SMALL)
    write_arrays(tmp_path, [flat[0], np.zeros((64, 12), np.float32), *flat[3:]])
    found = trax.read(tmp_path)
    assert (found.config.position.name, found.config.activation.name) == ("learned", "gelu_tanh")
    assert [kind.name for kind in found.config.layers] == ["exact", "lsh"]
    assert found.config.n_buckets == 16 and any("n_buckets" in note for note in found.notes)


def test_axial_positions_of_every_version(tmp_path: Path) -> None:
    """At HEAD, only a pos_type makes them axial: without one, pos_axial_shape is ignored there."""
    flat = flat_weights(SMALL)
    write_arrays(tmp_path, flat)
    write(tmp_path)  # of versions without pos_type
    expected = trax.read(tmp_path)
    write(tmp_path, pos_type="axial")
    found = trax.read(tmp_path)
    assert found.config == expected.config and found.config.position.name == "axial"
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())

    table = np.random.default_rng(3).normal(size=(64, 12)).astype(np.float32)
    for stored in (table, table[None]):
        write_arrays(tmp_path, [flat[0], stored, *flat[3:]])
        for dims in ([4, 8], [384, 384]):  # whatever they are, since they have no effect
            write(tmp_path, pos_d_axial_embs=dims)
            found = trax.read(tmp_path)
            assert torch.equal(found.weights["embedding.positions.table"], torch.from_numpy(table))
            assert any("pos_axial_shape" in note for note in found.notes)
    write(tmp_path, pos_type="axial", pos_axial_shape=[])
    complains(tmp_path, "pos_axial_shape=[]", "pos_type=axial")
    write(tmp_path, pos_type="axial")
    complains(tmp_path, "array 2 (positions, side 0)", "[1, 64, 12]")


@pytest.mark.parametrize("pos_type", ["sin-cos", "fixed-base", "infinite", "infinite-affine", "time-bin", "no"])
def test_other_positions_are_refused(pos_type: str, tmp_path: Path) -> None:
    write(tmp_path, pos_type=pos_type)
    write_arrays(tmp_path, flat_weights(SMALL))
    complains(tmp_path, f'pos_type="{pos_type}"', "axial")


def test_dropout_is_converted(tmp_path: Path) -> None:
    write_arrays(tmp_path, flat_weights(SMALL))
    for options, rate in (({}, 0.1), ({"dropout": 0.25}, 0.25), ({"dropout": 0}, 0.0)):
        write(tmp_path, **options)
        config = trax.read(tmp_path).config
        assert (config.dropout, config.ff_dropout, config.attention_dropout) == (rate, rate, rate)


def test_bfloat16_is_supported(tmp_path: Path) -> None:
    write(tmp_path)
    exact = [torch.from_numpy(array).bfloat16() for array in flat_weights(SMALL)]
    write_arrays(tmp_path, [tensor.view(torch.uint16).numpy() for tensor in exact])
    assert torch.equal(trax.read(tmp_path).weights["embedding.tokens.weight"], exact[0].float())


def test_weights_of_another_model(tmp_path: Path) -> None:
    write(tmp_path)
    flat = flat_weights(SMALL)
    write_arrays(tmp_path, flat[:-1])
    complains(tmp_path, "ends after", "the head, bias")
    write_arrays(tmp_path, [*flat, flat[0]])
    complains(tmp_path, "1 more arrays")
    write_arrays(tmp_path, [*flat[:5], flat[4], *flat[6:]])
    complains(tmp_path, "array 6 (layer 0, w_q)", "[12]", "[2, 12, 6]")
    (tmp_path / "model.weights.npy.gz").write_bytes(gzip.compress(b"\x93NUMPY nothing"))
    complains(tmp_path, "model.weights.npy.gz", "no valid array")
    (tmp_path / "model.weights.npy.gz").write_bytes(b"nothing")
    complains(tmp_path, "can't be decompressed")
    (tmp_path / "model.weights.npy.gz").unlink()
    complains(tmp_path, "has neither")
    write_pickle(tmp_path, {"flat_weights": 2})
    complains(tmp_path, "no weights", "model.weights.npy.gz")
    write_arrays(tmp_path, flat)
    write(tmp_path, ff_use_sru=1)
    complains(tmp_path, "ff_use_sru=1", "recurrent")
    write(tmp_path, reversible=True)
    complains(tmp_path, "no such option: reversible")
    write(tmp_path, d_attention_value=5)
    complains(tmp_path, "d_attention_value=5", "d_attention_key=6")


class Runs:
    """Its pickle runs a function when it is loaded."""

    def __init__(self, what: Any, *arguments: Any) -> None:
        self.call = (what, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(marker: Path) -> dict[str, bytes]:
    """Malicious or invalid pickles by the opcode to be refused; some would create the marker file."""
    command, touch = f"touch {marker}", f"S'touch {marker}'\n".encode()
    return {
        "STACK_GLOBAL: a command": pickle.dumps(Runs(os.system, command)),
        "GLOBAL: an old protocol": pickle.dumps(Runs(os.system, command), protocol=0),
        "STACK_GLOBAL: among weights": pickle.dumps({"flat_weights": [Runs(eval, f"open({str(marker)!r}, 'w')")]}),
        "STACK_GLOBAL: a loader of NumPy's": pickle.dumps(Runs(np.load, str(marker), None, True)),
        "STACK_GLOBAL: a name alone": pickle.dumps(os.system),
        "REDUCE: an array of objects": pickle.dumps(np.array([Runs(os.system, command)], dtype=object)),
        "INST: an instance": b"(" + touch + b"ios\nsystem\n.",
        "GLOBAL: an object": b"(cos\nsystem\n" + touch + b"o.",
        "GLOBAL: a class": b"cos\nsystem\n(" + touch + b"t\x81.",
        "EXT1: by number": b"\x82\x01.",
        "PERSID: by another's hand": b"Pname\n.",
        "REDUCE: what is no function": b"(" + touch + b"t" + touch[:-1] + b"\n(tR.",
        "REDUCE: objects by their dtype": b"cnumpy\ndtype\n(S'O8'\nK\x00K\x01tR.",
        "SETITEM: an attribute": b"cnumpy\nndarray\nS'x'\nK\x01s.",
        "BUILD: the state of a list": b"](K\x01tb.",
        ": itself": b"]q\x00h\x00a.",
        ": cut off": pickle.dumps([np.zeros(3)])[:-4],
        ": no pickle": b"hello",
        ": empty": b"",
    }


@pytest.mark.parametrize("kind", hostile(Path("marker")))
def test_hostile_pickles_run_nothing(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(CheckpointError) as caught:
        read_pickle(hostile(marker)[kind], "model.pkl.gz")
    opcode = kind.partition(":")[0]
    assert str(caught.value).startswith("model.pkl.gz: ")
    assert not opcode or opcode in str(caught.value)
    assert not marker.exists()


def test_plain_values_survive() -> None:
    values = [
        {"a": [1, -2, 2**70, 1.5, "text", b"bytes", None, True, (), (1,), (1, 2), (1, 2, 3, 4)]},
        [np.float32(2.5), np.int64(3), np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.eye(3))],
        defaultdict(list, {1: [2]}),
    ]
    for protocol in range(6):
        found = read_pickle(pickle.dumps(values, protocol=protocol), "values")
        assert found[0] == values[0] and found[2] == {1: [2]}
        assert found[1][:2] == [2.5, 3]
        for index in (2, 3):
            assert np.array_equal(found[1][index], values[1][index])

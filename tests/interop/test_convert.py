"""reformer-convert: import from other systems and export back."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_models import ENWIK8, SMALL, build, logits
from safetensors.torch import load_file

from reformer_dist import generate
from reformer_dist.convert import build_parser, run_conversion
from reformer_dist.data import write_dataset
from reformer_dist.data.format.tokenizer import BpeTokenizer, ByteTokenizer
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.errors import UserError
from reformer_dist.interop.vocabulary import find_tokenizer, hugging_face_files
from reformer_dist.run.build import build_trainer
from reformer_dist.run.compose import compose_run
from reformer_dist.run.pretrained import LoadedModel, load_model

transformers = pytest.importorskip("transformers")


SENTENCES = [
    f"The {a} {b}s in the {c}." for a in ["old", "new"] for b in ["look", "walk"] for c in ["sun", "rain"]
]


def convert(*arguments: str | Path) -> None:
    run_conversion(build_parser().parse_args([str(each) for each in arguments]))


def loaded(path: Path, *overrides: str) -> LoadedModel:
    return load_model(path, list(overrides), torch.device("cpu"))


@torch.no_grad()
def test_bytes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = build(ENWIK8)
    there.save_pretrained(tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "here")
    assert "language_model" in capsys.readouterr().out
    here = loaded(tmp_path / "here")
    text = "Wörter & <tags>".encode()
    tokens = torch.from_numpy(here.tokenizer.encode(text).astype("int64"))[None]
    assert tokens[0].tolist() == [byte + 2 for byte in text]  # as in google/reformer-enwik8
    assert here.tokenizer.decode(tokens[0].tolist()).encode() == text
    assert (here.model(tokens) - logits(there, tokens)).abs().max() < 1e-4
    convert(tmp_path / "here", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert (logits(back, tokens) - logits(there, tokens)).abs().max() < 1e-6
    more = loaded(tmp_path / "here", "model.n_hashes=8")
    assert more.config.model.n_hashes == 8


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece vocabulary of 60 pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "spiece.model"


def test_pieces_there_and_back(tmp_path: Path, spiece: Path) -> None:
    reference = transformers.ReformerTokenizer(str(spiece))
    there = build(SMALL | {"vocab_size": 64})  # more rows than pieces
    there.save_pretrained(tmp_path / "there")
    (tmp_path / "there" / "spiece.model").write_bytes(spiece.read_bytes())
    convert(tmp_path / "there", tmp_path / "here")
    tokenizer = loaded(tmp_path / "here").tokenizer
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (64, reference.eos_token_id)
    texts = [*SENTENCES, "", "  two  spaces\tand\na line ", "ﬁn ½ été 中 \U0001f600", "THE OLD"]
    for text in texts:
        ids = tokenizer.encode(text.encode()).tolist()
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == tokenizer.normalize(text.encode()).decode()
        if ids:  # SentencePiece prepends a space
            assert tokenizer.token_bytes[ids].sum() == len(tokenizer.normalize(text.encode())) + 1
    convert(tmp_path / "here", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back", use_fast=False)
    assert type(back).__name__ == "ReformerTokenizer"
    assert all(back.encode(text) == reference.encode(text) for text in texts)


def test_merges_there_and_back(tmp_path: Path) -> None:
    tokenizer = BpeTokenizer.train([text.encode() for text in SENTENCES * 9], 300)
    build(SMALL | {"vocab_size": tokenizer.vocab_size}).save_pretrained(tmp_path / "there")
    tokenizer.save(tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "here")
    convert(tmp_path / "here", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.eos_token_id == tokenizer.eos_id
    for text in (*SENTENCES, "ﬁn ½ été\n 中 \U0001f600"):
        ids = loaded(tmp_path / "here").tokenizer.encode(text.encode()).tolist()
        assert ids == tokenizer.encode(text.encode()).tolist() == back.encode(text)
        assert back.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_token_that_ends_a_text_there_and_back(tmp_path: Path) -> None:
    package = pytest.importorskip("tokenizers")
    BpeTokenizer.train([text.encode() for text in SENTENCES], 280).save(tmp_path)
    inner = package.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = BpeTokenizer.load(tmp_path / "tokenizer.json", "</s>")
    hugging_face_files(tokenizer, tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token_id == tokenizer.eos_id
    assert find_tokenizer(tmp_path, tokenizer.vocab_size, None).eos_id == tokenizer.eos_id


def test_the_vocabulary_must_fit(tmp_path: Path, spiece: Path) -> None:
    def complains(*words: str, arguments: tuple[str, ...] = ()) -> None:
        with pytest.raises(UserError) as caught:
            convert(tmp_path / "there", tmp_path / "here", *arguments)
        assert not (tmp_path / "here").exists()
        for word in words:
            assert word in str(caught.value)

    build(SMALL).save_pretrained(tmp_path / "there")
    complains("no vocabulary", "50 tokens", "--tokenizer")
    complains("bytes", "257 tokens", "50", arguments=("--tokenizer", "bytes"))
    complains("--tokenizer nowhere", "bytes+2", arguments=("--tokenizer", "nowhere"))
    complains("60 pieces", "50 tokens", arguments=("--tokenizer", str(spiece)))
    (tmp_path / "there" / "tokenizer.json").write_text("{}")
    complains("tokenizer.json")
    (tmp_path / "there" / "spiece.model").write_bytes(b"nothing")
    complains("spiece.model", "SentencePiece")


def test_what_is_no_model(tmp_path: Path) -> None:
    def complains(source: Path, target: Path, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            convert(source, target)
        for word in words:
            assert word in str(caught.value)

    source, target = tmp_path / "source", tmp_path / "target"
    complains(source, target, f"{source}: ")
    source.mkdir()
    complains(source, target, f"{source}: ", "checkpoint")
    complains(source, source, str(source), "exists")
    (source / "config.json").write_text('{"dim": 3}')
    complains(source, target, f"{source}", "model_type", "num_tokens", "model.pkl.gz")
    (source / "config.json").write_text('{"model_type": "bert"}')
    complains(source, target, "model_type=", "bert", "must be reformer")


def test_models_of_reformer_pytorch_and_trax(tmp_path: Path) -> None:
    from test_reformer_pytorch import build as build_lucid
    from test_reformer_pytorch import save
    from test_trax import SMALL as TRAX
    from test_trax import flat_weights, write, write_pickle

    save(build_lucid(num_tokens=257), tmp_path / "lucid", num_tokens=257)
    convert(tmp_path / "lucid", tmp_path / "from_lucid", "--tokenizer", "bytes")
    write(tmp_path / "trax", vocab_size=258)
    write_pickle(tmp_path / "trax", {"flat_weights": flat_weights(TRAX | {"vocab_size": 258})})
    convert(tmp_path / "trax", tmp_path / "from_trax")
    for name, vocab_size in (("from_lucid", 257), ("from_trax", 258)):
        tokens = torch.randint(0, vocab_size, (1, 40))
        assert loaded(tmp_path / name).model(tokens).isfinite().all()


@pytest.mark.parametrize("kind", ["MaskedLM", "SequenceClassification", "QuestionAnswering"])
@torch.no_grad()
def test_the_other_heads_there_and_back(kind: str, tmp_path: Path) -> None:
    options = SMALL | {"vocab_size": 258, "is_decoder": False, "local_num_chunks_after": 1}
    if kind == "SequenceClassification":
        options |= {"id2label": {0: "bad", 1: "good", 2: "odd"}, "label2id": {"bad": 0, "good": 1, "odd": 2}}
    there = build(options, f"ReformerFor{kind}")
    there.save_pretrained(tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "here")
    here = loaded(tmp_path / "here")
    convert(tmp_path / "here", tmp_path / "back")
    back = getattr(transformers, f"ReformerFor{kind}").from_pretrained(tmp_path / "back").eval()
    tokens = torch.randint(0, 258, (2, 45), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(45) < torch.tensor([[45], [30]])

    def outputs(model: Any) -> list[torch.Tensor]:
        found = model(tokens, attention_mask=mask)
        if kind == "QuestionAnswering":
            return [found.start_logits[mask], found.end_logits[mask]]
        return [found.logits if kind == "SequenceClassification" else found.logits[mask][:, :258]]

    found = here.model(tokens, key_padding_mask=mask)
    if kind == "QuestionAnswering":
        mine = [found[0][mask], found[1][mask]]
    else:
        mine = [found if kind == "SequenceClassification" else found[mask][:, :258]]
    for right, of_back, ours in zip(outputs(there), outputs(back), mine, strict=True):
        assert (ours - right).abs().max() < 1e-4
        assert (of_back - right).abs().max() < 1e-4
    convert(tmp_path / "back", tmp_path / "again")  # neither a second mask token nor other names
    again = loaded(tmp_path / "again")
    assert all(torch.equal(again.model.state_dict()[name], x) for name, x in here.model.state_dict().items())
    assert list(again.task.labels) == list(here.task.labels) and again.config.task == here.config.task
    assert kind != "SequenceClassification" or list(again.task.labels) == ["bad", "good", "odd"]


def write_like(tokenizer: Any, folder: Path) -> Path:
    documents = [(f"doc{number}", f"{number} {text * 9}".encode()) for number, text in enumerate(SENTENCES * 6)]
    write_dataset(documents, folder, tokenizer, shard_bytes=20_000, heldout_fraction=0.2)
    return folder


def test_a_converted_model_is_fine_tuned_and_generates(
    tmp_path: Path, job: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    build(SMALL | {"vocab_size": 258}).save_pretrained(tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "here")
    data = write_like(ByteTokenizer(2, 1), tmp_path / "data")
    words = [
        f"init_from={tmp_path / 'here'}", f"data.path={data}", f"output_dir={tmp_path / 'run'}", "data.seq_len=64",
        "data.batch_size=2", "trainer.max_steps=2", "trainer.eval_every=0", "trainer.sample_every=0",
        "optim.lr=0", "optim.weight_decay=0", "model.dropout=0.1", "trainer.micro_batch_size=1",
    ]  # fmt: skip
    config = compose_run(words)
    assert (config.model.chunk_len, config.model.is_concat, config.model.dropout) == (8, True, 0.1)
    with ExitStack() as resources:
        build_trainer(config, job, resources).fit()
    before = load_file(tmp_path / "here" / "model.safetensors")
    after = loaded(tmp_path / "run").model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # the learning rate was 0

    other = write_like(ByteTokenizer(), tmp_path / "other")
    with pytest.raises(UserError) as caught, ExitStack() as resources:
        wrong = compose_run([*words, f"data.path={other}", f"output_dir={tmp_path / 'wrong'}"])
        build_trainer(wrong, job, resources)
    for part in ("data.path", f"init_from={tmp_path / 'here'}", "--tokenizer-of"):
        assert part in str(caught.value)

    arguments = [str(tmp_path / "run"), "--prompt", "The ", "--max-new-tokens", "3", "--temperature", "0"]
    generate.run_generation(generate.build_parser().parse_intermixed_args(arguments))
    assert capsys.readouterr().out.count("The ") == 1


def test_init_from_needs_a_valid_export(tmp_path: Path) -> None:
    unfinished = f"output_dir={tmp_path / 'run'}"  # a run with checkpoints of its own needs no export
    with pytest.raises(UserError) as caught:
        compose_run([f"init_from={tmp_path}", unfinished])
    assert str(tmp_path) in str(caught.value)
    build(SMALL | {"vocab_size": 258}).save_pretrained(tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "here")
    path = tmp_path / "here" / "config.json"
    described = json.loads(path.read_text())
    described["config"]["model"]["unheard_of"] = 1
    path.write_text(json.dumps(described))
    with pytest.raises(UserError) as caught:
        compose_run([f"init_from={tmp_path / 'here'}", unfinished])
    assert "unheard_of" in str(caught.value)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from reformer_dist.convert import main

    monkeypatch.setattr(sys, "argv", ["reformer-convert", str(tmp_path / "nothing"), str(tmp_path / "target")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1 and capsys.readouterr().err.startswith("error: ")

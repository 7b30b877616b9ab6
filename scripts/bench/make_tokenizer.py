"""Makes a tokenizer.json as large as V4's: 129,280 ids, for benchmarks and identity tests.

The released tokenizer is not part of this tree. This one has its shape: byte-level BPE with V4's
pre-tokenizer and control tokens, both copied from the tokenizer of the demo model, 128,000 ids in
the vocabulary and the added tokens behind them, filled up with place holders. Its merges are learnt
from text that lies on the machine anyway: sources and documentation of installed packages, and
Chinese sentences put together from a fixed list of words, because packages have none.

The same files give the same bytes. Not here: anything that measures.
"""

import argparse
import hashlib
import json
import random
import sys
import sysconfig
from pathlib import Path

N_IDS = 129_280
N_VOCAB = 128_000
# What is read of one file and in all, in bytes, by kind of text: a quarter is prose.
MAX_FILE = 128 * 1024
BUDGETS = {
    (".rs",): 14_000_000,
    (".py", ".pyi"): 10_000_000,
    (".c", ".h", ".cc", ".cpp", ".hpp", ".js", ".ts", ".sh", ".html", ".css"): 8_000_000,
    (".json", ".toml", ".yaml", ".yml", ".xml"): 3_000_000,
    (".md", ".rst", ".txt", ""): 12_000_000,
}
ROOTS = [
    Path.home() / ".cargo/registry/src",
    Path(sysconfig.get_paths()["stdlib"]),
    Path("/usr/lib/python3"),
    Path("/usr/share/doc"),
    Path("/usr/share/perl"),
    Path("/usr/include"),
]
CHINESE = (
    "我们 你们 他们 这个 那个 什么 怎么 为什么 因为 所以 但是 如果 虽然 已经 可以 需要 应该 可能 使用 "
    "问题 回答 方法 系统 模型 数据 计算 程序 代码 文件 网络 服务 请求 结果 时间 地方 世界 国家 城市 "
    "中国 北京 上海 语言 文字 学习 工作 生活 学生 老师 朋友 孩子 今天 明天 昨天 现在 以后 以前 开始 "
    "结束 知道 觉得 喜欢 希望 帮助 提供 支持 实现 处理 分析 设计 测试 运行 安装 错误 信息 用户 功能 "
    "的 了 在 是 和 有 不 也 都 就 很 一 个 人 到 说 要 去 会 着 看 好 自己 没有 非常 一个 一些 其中"
).split()


def candidates(suffixes: tuple[str, ...]) -> list[tuple[bytes, Path]]:
    """Files of a kind, in an order that mixes packages and depends on nothing but their paths."""
    found = []
    for root in ROOTS:
        for path in root.rglob("*") if root.is_dir() else ():
            if path.suffix.lower() in suffixes and path.is_file() and not path.is_symlink():
                name = path.relative_to(root).as_posix().encode(errors="surrogateescape")
                found.append((hashlib.sha256(name).digest(), path))
    return sorted(found)


def texts() -> list[str]:
    """The training text, one file each."""
    chosen = []
    for suffixes, budget in BUDGETS.items():
        n_before = len(chosen)
        for _, path in candidates(suffixes):
            try:
                text = path.read_bytes()[:MAX_FILE].decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if budget <= 0:
                break
            chosen.append(text)
            budget -= len(text)
        print(f"{' '.join(suffixes)}: {len(chosen) - n_before} files", file=sys.stderr)
    chooser = random.Random(4)
    weights = [1 / (rank + 3) for rank in range(len(CHINESE))]
    for _ in range(4000):
        words = chooser.choices(CHINESE, weights, k=200)
        chosen.append("".join(word + chooser.choice(["", "", "", "", "", "，", "。"]) for word in words))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nano", type=Path, default=Path("models/nano/tokenizer.json"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    from tokenizers import AddedToken, Tokenizer, trainers

    nano = json.loads(args.nano.read_text())
    first = [token for token in nano["added_tokens"] if token["id"] < 3]
    rest = [token for token in nano["added_tokens"] if token["id"] >= 3]
    empty = dict(nano, added_tokens=[], model=dict(nano["model"], vocab={}, merges=[]))
    tokenizer = Tokenizer.from_str(json.dumps(empty))
    alphabet = [text for text, id in nano["model"]["vocab"].items() if 3 <= id < 259]
    assert len(alphabet) == 256, "the demo model's vocabulary begins with all bytes"
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        min_frequency=2,
        initial_alphabet=alphabet,
        special_tokens=[AddedToken(token["content"], special=True) for token in first],
        max_token_length=128,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)

    made = json.loads(tokenizer.to_str())
    n_learnt = len(made["model"]["vocab"])
    if n_learnt != N_VOCAB:
        sys.exit(f"only {n_learnt} of {N_VOCAB} entries could be learnt: there is too little text")
    holders = [f"<｜place▁holder▁no▁{i}｜>" for i in range(N_IDS - N_VOCAB - len(rest))]
    plain = next(token for token in rest if not token["special"])
    added = [dict(plain, content=text) for text in holders] + rest
    added = [dict(token, id=N_VOCAB + i) for i, token in enumerate(added)]
    result = dict(nano, added_tokens=first + added, model=made["model"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, ensure_ascii=False))
    digest = hashlib.sha256(args.out.read_bytes()).hexdigest()
    print(f"{args.out}: {N_IDS} ids, {len(made['model']['merges'])} merges, sha256 {digest}")


if __name__ == "__main__":
    main()

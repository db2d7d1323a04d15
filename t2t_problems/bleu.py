"""BLEU as the paper reports it, as T2T computes it and as sacreBLEU does, side by side: the three are not comparable.

`python -m t2t_problems.bleu --translation FILE --reference FILE` prints all of them with the way the text was decoded.
`paper_bleu` is the one to call from Python; it needs neither TensorFlow nor T2T.

The paper's measure follows tensor2tensor/utils/get_ende_bleu.sh: Unicode punctuation replaced, Moses tokens, compounds
split at their hyphens, then the formula of Moses' multi-bleu.perl, which scores 0 where no four words in a row match.
"""

from __future__ import annotations

import argparse
import functools
import html
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import AbstractSet, NamedTuple, Sequence

from train_large.errors import UserError

DETOKENIZED: AbstractSet[str] = frozenset()
SIDES = ("translation", "reference")


class Scores(NamedTuple):
    """One text's BLEU by each measure, in 0..100, and sacreBLEU's signature."""

    paper: float
    paper_unsplit: float
    t2t_cased: float
    t2t_uncased: float
    sacrebleu: float
    sacrebleu_signature: str


def scores(
    translations: Sequence[str],
    references: Sequence[str],
    lang: str = "fr",
    tokenized: AbstractSet[str] = DETOKENIZED,
) -> Scores:
    """Score translations against one reference each by every measure.

    `tokenized` names the sides ("translation", "reference") whose words are already Moses tokens. Those go through
    `plain_tokens` for the paper's measure, and are joined into plain text by sacremoses for T2T's and sacreBLEU's.
    Raises UserError for lists that are empty or of unequal length, and for a language sacremoses has no rules for.
    """
    tokens = _token_sides(translations, references, lang, tokenized)
    plain = [
        [_detokenize(line, lang) for line in lines] if side in tokenized else list(lines)
        for side, lines in zip(SIDES, (translations, references))
    ]
    sacrebleu, signature = sacre_bleu(plain[0], plain[1])
    return Scores(
        paper=multi_bleu(*[[split_compounds(line) for line in lines] for lines in tokens]),
        paper_unsplit=multi_bleu(*tokens),
        t2t_cased=t2t_bleu(plain[0], plain[1], cased=True),
        t2t_uncased=t2t_bleu(plain[0], plain[1], cased=False),
        sacrebleu=sacrebleu,
        sacrebleu_signature=signature,
    )


def paper_bleu(
    translations: Sequence[str],
    references: Sequence[str],
    lang: str = "fr",
    tokenized: AbstractSet[str] = DETOKENIZED,
) -> float:
    """Tokenised case-sensitive BLEU with compounds split, in 0..100: the measure of the paper's Figure 5.

    Arguments and errors are those of `scores`.
    """
    tokens = _token_sides(translations, references, lang, tokenized)
    return multi_bleu(*[[split_compounds(line) for line in lines] for lines in tokens])


def moses_tokens(text: str, lang: str) -> str:
    """Plain text as Moses tokens with a space between them, like tokenizer.perl -l LANG -no-escape (no -a).

    Unicode punctuation is replaced first (’ by ', … by ...), as get_ende_bleu.sh does. XML is not escaped: BLEU is the
    same either way, as long as both sides agree. One difference to today's tokenizer.perl is known: sacremoses leaves
    the full stop on a last word that has another inside (`ioprio.h.`).
    """
    tokenizer, normalizer, _ = _moses(lang)
    return tokenizer.tokenize(normalizer.replace_unicode_punct(text), return_str=True, escape=False)


def split_compounds(tokens: str) -> str:
    """Moses tokens with compounds split: `est-il` becomes `est ##AT##-##AT## il`.

    On bytes, like the one line of Perl in get_ende_bleu.sh, which does not know UTF-8. Matches may not overlap, so the
    second hyphen of `a-t-il` stays, but both of `est-à-dire` are split, `à` being two bytes.
    """
    return re.sub(rb"(\S)-(\S)", rb"\1 ##AT##-##AT## \2", tokens.encode()).decode()


def plain_tokens(tokens: str, lang: str) -> str:
    """Moses tokens made elsewhere, as `moses_tokens` would write them.

    Undoes what tokenizer.perl does by default (' as &apos;), with -a (a @-@ b) and compound splitting
    (a ##AT##-##AT## b), so that a file with any of these can be compared with one without.
    """
    whole = re.sub(r"(?<=\S) (?:@-@|##AT##-##AT##) (?=\S)", "-", tokens)
    return _moses(lang)[2].unescape_xml(whole)


def multi_bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of tokenised lines, in 0..100, as multi-bleu.perl computes it: cased, up to 4-grams, no smoothing.

    The counts are sacreBLEU's. Like Perl, words are only split at ASCII white space.
    """
    from sacrebleu.metrics import BLEU

    measure = BLEU(tokenize="none", smooth_method="none", force=True)
    sides = [[_ascii_spaced(line) for line in lines] for lines in (translations, references)]
    # The mean of four logarithms of 100 can come out a little above it.
    return min(100.0, measure.corpus_score(sides[0], [sides[1]]).score)


def t2t_bleu(translations: Sequence[str], references: Sequence[str], cased: bool) -> float:
    """BLEU of plain text as t2t-bleu prints it, in 0..100: mteval-v14's tokens, smoothed where an order has no match.

    Upstream's own functions (tensor2tensor/utils/bleu_hook.py, 1.15.7), imported here as they bring TensorFlow in.
    """
    from tensor2tensor.utils.bleu_hook import bleu_tokenize, compute_bleu

    sides = [[bleu_tokenize(line if cased else line.lower()) for line in lines] for lines in (references, translations)]
    return 100 * float(compute_bleu(*sides))


def sacre_bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """sacreBLEU of plain text with its default settings (13a tokens, cased), in 0..100, and its signature."""
    from sacrebleu.metrics import BLEU

    measure = BLEU()
    score = measure.corpus_score(list(translations), [list(references)]).score
    return min(100.0, score), str(measure.get_signature())


def _token_sides(
    translations: Sequence[str], references: Sequence[str], lang: str, tokenized: AbstractSet[str]
) -> list[list[str]]:
    """Both sides as Moses tokens, compounds not split."""
    if len(translations) != len(references):
        raise UserError(f"There are {len(translations)} translations but {len(references)} references: pair them.")
    if not translations:
        raise UserError("There are no translations to score: give at least one.")
    return [
        [plain_tokens(line, lang) if side in tokenized else moses_tokens(line, lang) for line in lines]
        for side, lines in zip(SIDES, (translations, references))
    ]


def _detokenize(tokens: str, lang: str) -> str:
    return _moses(lang)[2].detokenize(plain_tokens(tokens, lang).split(), unescape=False)


def _ascii_spaced(tokens: str) -> str:
    """Other white space, such as a no-break space, written as an entity so that sacreBLEU does not split there."""
    return re.sub(r"[^\S \t\n\r\f\v]", lambda space: f"&#{ord(space.group())};", tokens)


@functools.lru_cache(maxsize=None)
def _moses(lang: str) -> tuple:
    """sacremoses' tokenizer, punctuation normalizer and detokenizer for a language; they take a second to import."""
    from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer
    from sacremoses.corpus import NonbreakingPrefixes

    known = sorted(set(NonbreakingPrefixes().available_langs.values()))
    if lang not in known:
        raise UserError(f"Language {lang!r}: sacremoses has rules for {', '.join(known)}; give the nearest of these.")
    return MosesTokenizer(lang), MosesPunctNormalizer(lang), MosesDetokenizer(lang)


def read_sentences(path: Path) -> list[str]:
    r"""One sentence for each line of a text file, or for each <seg> of an .sgm file as WMT gives references.

    Lines end at \n or \r\n only; a byte order mark is dropped.
    Raises UserError for a file that is missing, not UTF-8, or has no sentences.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}): give a text file.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8 text (line {line}): convert it, for example with iconv.") from None
    if path.suffix.lower() in (".sgm", ".sgml"):
        return _segments(text, path)
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path} is empty: give a file with one sentence per line.")
    return [line[:-1] if line.endswith("\r") else line for line in lines]


def _segments(text: str, path: Path) -> list[str]:
    segments = re.findall(r"<seg\b[^>]*>(.*?)</seg>", text, re.DOTALL | re.IGNORECASE)
    if not segments:
        raise UserError(f"{path} has no <seg> elements: give an mteval SGML file, or rename a plain one to .txt.")
    if len(segments) != len(re.findall(r"<seg\b", text, re.IGNORECASE)):
        raise UserError(f"{path} has a <seg> that is not closed by </seg>: get the file again.")
    # html.unescape alone would also take the "&not" of "R&notes" for an entity.
    return [
        " ".join(re.sub(r"&#?\w+;", lambda entity: html.unescape(entity.group()), segment).split("\n")).strip()
        for segment in segments
    ]


def read_pair(translation: Path, reference: Path) -> tuple[list[str], list[str]]:
    """The sentences of both files. An empty translation is one that scores nothing; an empty reference is an error.

    Raises UserError for files of unequal length, an empty reference, and whatever `read_sentences` does.
    """
    translations, references = read_sentences(translation), read_sentences(reference)
    if len(translations) != len(references):
        raise UserError(
            f"{translation} has {len(translations)} sentences but {reference} has {len(references)}: "
            "give the reference of the very text that was translated."
        )
    for number, line in enumerate(references, start=1):
        if not line.strip():
            raise UserError(f"{reference} has an empty reference (sentence {number}): drop it from both files.")
    return translations, references


def decoding_in_name(path: Path) -> dict[str, float]:
    """The beam size and alpha that T2T's decoder writes into its file names (`NAME.beam4.alpha0.6.decodes`)."""
    found = re.search(r"\.beam(\d+)\.alpha(\d+(?:\.\d+)?(?:e-?\d+)?)\.decodes", Path(path).name)
    return {"beam_size": int(found.group(1)), "alpha": float(found.group(2))} if found else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores of one translated file; 0 when done, 2 for bad input."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # T2T's measure imports TensorFlow, which greets at length
    try:
        translations, references = read_pair(options.translation, options.reference)
        tokenized = frozenset(SIDES if options.tokenized == "both" else filter(None, [options.tokenized]))
        values = scores(translations, references, options.lang, tokenized)
    except UserError as error:
        print(f"t2t_problems.bleu: error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"t2t_problems.bleu: error: {error}; run it in the environment `make env-t2t` sets up.", file=sys.stderr)
        return 2
    named = decoding_in_name(options.translation)
    report = {
        "scores": {name: value for name, value in values._asdict().items() if name != "sacrebleu_signature"},
        "sacrebleu_signature": values.sacrebleu_signature,
        "sacremoses": _sacremoses_version(),
        "translation": str(options.translation),
        "reference": str(options.reference),
        "sentences": len(translations),
        "empty_translations": sum(not line.strip() for line in translations),
        "lang": options.lang,
        "tokenized": [side for side in SIDES if side in tokenized],
        "beam_size": _decoding("beam_size", options, named),
        "alpha": _decoding("alpha", options, named),
        "checkpoints_averaged": _decoding("average", options, named),
    }
    print(json.dumps(report) if options.json else _table(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m t2t_problems.bleu",
        description="BLEU of a translated file by the paper's measure, T2T's own and sacreBLEU's.",
        epilog="What --beam-size, --alpha and --average say is only stated beside the scores.",
    )
    add = parser.add_argument
    add("--translation", type=Path, required=True, help="one sentence per line, or .sgm")
    add("--reference", type=Path, required=True, help="one sentence per line, or .sgm as WMT gives it")
    add("--tokenized", choices=[*SIDES, "both"], help="the sides that are Moses tokens already (default: neither)")
    add("--lang", default="fr", help="language of both files (default: fr)")
    add("--beam-size", type=_at_least_one, help="beam size (default: from a name that T2T's decoder gave)")
    add("--alpha", type=_penalty, help="length penalty (default: from a name that T2T's decoder gave)")
    add("--average", type=_at_least_one, help="number of checkpoints averaged")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _at_least_one(text: str) -> int:
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _penalty(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _decoding(name: str, options: argparse.Namespace, named: dict[str, float]) -> dict | None:
    """A decoding setting, where it is from and, when the file's name says otherwise, what the name says."""
    given, in_name = getattr(options, name), named.get(name)
    if given is None:
        return None if in_name is None else {"value": in_name, "from": "file name"}
    setting = {"value": given, "from": "flag"}
    if in_name not in (None, given):
        setting["file_name_says"] = in_name
    return setting


def _sacremoses_version() -> str:
    """Of the installed package: `sacremoses.__version__` is 0.0.41 in 0.0.53."""
    try:
        from importlib.metadata import version
    except ImportError:  # Python 3.7
        from importlib_metadata import version  # type: ignore[no-redef]
    return version("sacremoses")


def _table(report: dict) -> str:
    empty = report["empty_translations"]
    lines = [
        f"translation           {report['translation']}",
        f"reference             {report['reference']}",
        f"sentences             {report['sentences']}" + (f", {empty} with an empty translation" if empty else ""),
        f"beam size             {_stated(report['beam_size'])}",
        f"length penalty alpha  {_stated(report['alpha'])}",
        f"checkpoints averaged  {_stated(report['checkpoints_averaged'])}",
    ]
    if report["tokenized"]:
        sides = " and ".join(report["tokenized"])
        lines.append(f"given tokenised       {sides}; detokenised by sacremoses for T2T's BLEU and sacreBLEU")
    tokens = f"sacremoses {report['sacremoses']}, {report['lang']}"
    measures = {
        "paper": f"the paper's: cased, Moses tokens ({tokens}), compounds split",
        "paper_unsplit": "the same, compounds not split",
        "t2t_cased": "T2T's own (t2t-bleu), cased",
        "t2t_uncased": "T2T's own (t2t-bleu), uncased",
        "sacrebleu": f"sacreBLEU, {report['sacrebleu_signature']}",
    }
    lines += ["", "  BLEU  measure (no two of them are comparable)"]
    lines += [f"{report['scores'][name]:6.2f}  {measure}" for name, measure in measures.items()]
    return "\n".join(lines)


def _stated(setting: dict | None) -> str:
    if setting is None:
        return "unstated"
    if setting["from"] == "file name":
        return f"{setting['value']} (from the translation's file name)"
    says = setting.get("file_name_says")
    return str(setting["value"]) + ("" if says is None else f" (but the translation's file name says {says})")


if __name__ == "__main__":
    sys.exit(main())

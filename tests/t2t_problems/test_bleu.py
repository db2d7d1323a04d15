"""BLEU by each measure, against upstream's own results, a computation written out here and figures worked by hand."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2t_problems import bleu
from train_large.errors import UserError

ROOT = Path(bleu.__file__).resolve().parents[1]

REFERENCES = [
    "« Aujourd’hui, l'homme d'État a-t-il dit la vérité\u00a0? » s'est interrogé M. Dupont-Aignan.",
    "C'est-à-dire que 3\u202f000 personnes (dont 12,5 % de nouveaux-venus) étaient là : peut-être…",
    "Le Premier ministre rencontrera son homologue à 12 h 30, à Saint-Étienne, devant l'arc-en-ciel.",
    "AT&T a vendu 10 % de ses parts pour 2,5 millions d'euros, n'est-ce pas ?",
    "Nous avons marché jusqu'à la gare, puis le train est parti.",
]
TRANSLATIONS = [
    "« Aujourd'hui, l'homme d'État a-t-il dit vrai ? » s'est demandé M. Dupont-Aignan.",
    "C'est-à-dire que 3 000 personnes (dont 12,5 % de nouveaux venus) étaient là : peut-être...",
    "le premier ministre rencontrera son homologue à 12 h 30 à Saint-Étienne, devant l'arc-en-ciel.",
    "AT&T a vendu 10 % de ses parts pour 2,5 millions d'euros, n'est-ce pas ?",
    "Nous marchions jusqu'à la gare, et le train était déjà parti.",
]


def moses_multi_bleu(translations, references):
    """multi-bleu's formula from its definition: clipped n-gram precision, geometric mean, brevity penalty."""
    words = [[re.findall(r"[^ \t\n\r\f\v]+", line) for line in side] for side in (translations, references)]
    precisions = []
    for order in range(1, 5):
        matched = total = 0
        for translated, wanted in zip(*words):
            grams, there = (
                Counter(tuple(side[start : start + order]) for start in range(len(side) - order + 1))
                for side in (translated, wanted)
            )
            matched += sum(min(count, there[gram]) for gram, count in grams.items())
            total += sum(grams.values())
        if not matched:
            return 0.0
        precisions.append(matched / total)
    length, wanted_length = (sum(map(len, side)) for side in words)
    penalty = min(1.0, math.exp(1 - wanted_length / length))
    return 100 * penalty * math.exp(sum(map(math.log, precisions)) / 4)


def two_decimals(value):
    return pytest.approx(value, abs=0.005)


WORDS = st.sampled_from(["le", "la", "chat", "dort", "est-il", ",", ".", "l'", "n\u00a0o", "x\u2009y"])
LINES = st.lists(WORDS, max_size=12).map(" ".join)
PAIRS = st.lists(st.tuples(LINES, LINES.filter(bool)), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("translation", "reference", "expected"),
    [
        # 5/6, 3/5, 2/4 and 1/3 match: (1/12) ** (1/4)
        ("le chat dort sur le tapis", "le chat dort sur un tapis", 53.73),
        # all match, but four words stand for six: exp(1 - 6/4)
        ("a b c d", "a b c d e f", 60.65),
        # clipped: 2/7, then no pair matches
        ("le le le le le le le", "le chat est sur le tapis", 0.0),
        # too short to hold four words in a row
        ("a b c", "a b c", 0.0),
        ("", "a b c d", 0.0),
        ("a b c d", "a b c d", 100.0),
        # cased: 5/6, 4/5, 3/4, 2/3 match, (1/3) ** (1/4)
        ("le chat dort sur un tapis", "Le chat dort sur un tapis", 75.98),
    ],
)
def test_multi_bleu_by_hand(translation, reference, expected):
    assert bleu.multi_bleu([translation], [reference]) == two_decimals(expected)
    assert moses_multi_bleu([translation], [reference]) == two_decimals(expected)


@given(PAIRS)
@settings(deadline=None)  # the first example imports sacreBLEU
def test_multi_bleu_equals_its_definition(pairs):
    translations, references = zip(*pairs)
    assert bleu.multi_bleu(translations, references) == two_decimals(moses_multi_bleu(translations, references))


@given(PAIRS, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_order_of_pairs_does_not_matter(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert bleu.paper_bleu(*zip(*shuffled)) == pytest.approx(bleu.paper_bleu(*zip(*pairs)), abs=1e-9)


@given(st.lists(st.lists(WORDS, min_size=4, max_size=9).map(" ".join), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_text_scores_100_against_itself(lines):
    assert bleu.scores(lines, lines)[:5] == pytest.approx((100, 100, 100, 100, 100), abs=1e-4)


def test_moses_tokens():
    assert [bleu.moses_tokens(line, "fr") for line in REFERENCES[:4]] == [
        "« Aujourd' hui , l' homme d' État a-t-il dit la vérité ? » s' est interrogé M. Dupont-Aignan .",
        "C' est-à-dire que 3 000 personnes ( dont 12,5 % de nouveaux-venus ) étaient là : peut-être ...",
        "Le Premier ministre rencontrera son homologue à 12 h 30 , à Saint-Étienne , devant l' arc-en-ciel .",
        "AT & T a vendu 10 % de ses parts pour 2,5 millions d' euros , n' est-ce pas ?",
    ]
    assert bleu.moses_tokens("He's here.", "en") == "He 's here ."  # English keeps the apostrophe with what follows
    assert bleu.moses_tokens("", "fr") == ""


SPLIT = " ##AT##-##AT## "
COMPOUNDS = {
    "rich-text format": f"rich{SPLIT}text format",
    "a-t-il": f"a{SPLIT}t-il",  # the t is taken by the first match
    "est-à-dire": f"est{SPLIT}à{SPLIT}dire",  # à has two bytes, one for each match
    "arc-en-ciel": f"arc{SPLIT}en{SPLIT}ciel",
    "a--b": f"a{SPLIT}-b",
    "a---b": f"a{SPLIT}--b",
    "- non -": "- non -",
    "-5 et 5-": "-5 et 5-",
    "n\u00a0-x": f"n\u00a0{SPLIT}x",  # Perl sees the last byte of the no-break space, which is not white
    "–-–": f"–{SPLIT}–",
    "": "",
}


@pytest.mark.parametrize(("tokens", "expected"), COMPOUNDS.items())
def test_split_compounds(tokens, expected):
    assert bleu.split_compounds(tokens) == expected


def split_by_perl(lines):
    one_line = r"s{(\S)-(\S)}{$1 ##AT##-##AT## $2}g"
    done = subprocess.run(
        ["perl", "-ple", one_line],
        input="".join(line + "\n" for line in lines).encode(),
        stdout=subprocess.PIPE,
        check=True,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )
    return done.stdout.decode().split("\n")[:-1]


@pytest.mark.skipif(not shutil.which("perl"), reason="needs perl")
def test_split_compounds_equals_perl():
    cases = [*COMPOUNDS, *REFERENCES, *TRANSLATIONS, *(bleu.moses_tokens(line, "fr") for line in REFERENCES)]
    assert [bleu.split_compounds(case) for case in cases] == split_by_perl(cases)


@pytest.mark.skipif(not shutil.which("perl"), reason="needs perl")
@given(st.lists(st.text("-ab é\u00a0à\t–\u2028", max_size=12), min_size=1, max_size=40))
@settings(max_examples=20, deadline=None)
def test_split_compounds_equals_perl_on_anything(lines):
    assert [bleu.split_compounds(line) for line in lines] == split_by_perl(lines)


def test_scores_equal_each_measure_computed_elsewhere(tmp_path):
    tokens = [[bleu.moses_tokens(line, "fr") for line in side] for side in (TRANSLATIONS, REFERENCES)]
    split = [[bleu.split_compounds(line) for line in side] for side in tokens]
    scores = bleu.scores(TRANSLATIONS, REFERENCES)
    assert scores.paper == two_decimals(moses_multi_bleu(*split))
    assert scores.paper_unsplit == two_decimals(moses_multi_bleu(*tokens))
    assert scores.paper == bleu.paper_bleu(TRANSLATIONS, REFERENCES)
    assert scores.paper > scores.paper_unsplit  # splitting adds matches where compounds are right

    from tensor2tensor.utils.bleu_hook import bleu_wrapper

    translation, reference = tmp_path / "translation", tmp_path / "reference"
    write(translation, TRANSLATIONS)
    write(reference, REFERENCES)
    for cased, value in ((True, scores.t2t_cased), (False, scores.t2t_uncased)):
        assert value == pytest.approx(100 * bleu_wrapper(str(reference), str(translation), cased), abs=1e-4)
    assert scores.t2t_uncased > scores.t2t_cased

    by_command = subprocess.run(
        [sys.executable, "-m", "sacrebleu", str(reference), "-i", str(translation), "-w", "4", "-f", "text"],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    ).stdout.decode()
    assert by_command.startswith(f"BLEU|{scores.sacrebleu_signature} = {scores.sacrebleu:.4f} ")
    assert len({round(value, 2) for value in scores[:5]}) == 5


@pytest.mark.parametrize(
    "convention",
    [
        lambda line: line,
        lambda line: line.replace("&", "&amp;").replace("'", "&apos;").replace('"', "&quot;"),
        lambda line: re.sub(r"(?<=\w)-(?=\w)", " @-@ ", line),
        lambda line: bleu.split_compounds(line.replace("&", "&amp;").replace("'", "&apos;")),
    ],
    ids=["as it is", "escaped", "aggressive", "escaped and split"],
)
def test_tokenised_text_scores_as_its_plain_text(convention):
    tokens = [[convention(bleu.moses_tokens(line, "fr")) for line in side] for side in (TRANSLATIONS, REFERENCES)]
    expected = bleu.scores(TRANSLATIONS, REFERENCES)
    for tokenized in ({"translation"}, {"reference"}, {"translation", "reference"}):
        given = [
            there if side in tokenized else plain
            for side, there, plain in zip(bleu.SIDES, tokens, (TRANSLATIONS, REFERENCES))
        ]
        scores = bleu.scores(*given, tokenized=tokenized)
        assert scores[:2] == pytest.approx(expected[:2], abs=1e-9)
    plain = [[bleu._detokenize(line, "fr") for line in side] for side in tokens]
    assert "l'homme d'État a-t-il dit" in plain[0][0]
    assert "&" not in plain[0][0]
    assert scores[2:] == bleu.scores(*plain)[2:]  # both sides tokenised: all else is scored detokenised


def test_scores_need_pairs_and_a_known_language():
    with pytest.raises(UserError, match="2 translations but 1 references"):
        bleu.scores(["a", "b"], ["a"])
    with pytest.raises(UserError, match="no translations"):
        bleu.paper_bleu([], [])
    with pytest.raises(UserError, match=r"'french'.* fr,"):
        bleu.paper_bleu(["a"], ["a"], "french")


def test_the_module_and_the_papers_measure_need_no_tensorflow():
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('bleu', sys.argv[1])\n"
        "bleu = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(bleu)\n"
        "assert 'sacremoses' not in sys.modules and 'sacrebleu' not in sys.modules\n"
        "assert round(bleu.paper_bleu(['a b c d'], ['a b c d e f']), 2) == 60.65\n"
        "assert not {'tensorflow', 'tensor2tensor'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, bleu.__file__], check=True, env=environment)


def write(path, lines, end="\n"):
    path.write_bytes("".join(line + end for line in lines).encode())


def test_sentences_end_at_line_feeds_only(tmp_path):
    lines = ["un\u2028deux", "trois\x0bquatre\x85cinq", "", "six"]
    for end in ("\n", "\r\n"):
        write(tmp_path / "text", lines, end)
        assert bleu.read_sentences(tmp_path / "text") == lines
    (tmp_path / "text").write_bytes("\ufeffun\ndeux".encode())
    assert bleu.read_sentences(tmp_path / "text") == ["un", "deux"]


def test_sgm(tmp_path):
    path = tmp_path / "newstest2014-fren-ref.fr.sgm"
    path.write_text(
        '<refset setid="newstest2014" srclang="any" trglang="fr">\n<doc sysid="ref" docid="1">\n<hl>\n'
        '<seg id="1"> R&amp;D : &quot;5 &lt; 6&quot; &amp;lt; &#233;t&#xe9; </seg>\n</hl>\n<p>\n'
        '<SEG id="2">&notable à\nlire</SEG><seg id="3"></seg>\n</p></doc></refset>\n',
        encoding="utf-8",
    )
    assert bleu.read_sentences(path) == ['R&D : "5 < 6" &lt; été', "&notable à lire", ""]
    path.write_text('<seg id="1">un\n<seg id="2">deux</seg>', encoding="utf-8")
    with pytest.raises(UserError, match="not closed"):
        bleu.read_sentences(path)
    path.write_text("un\ndeux\n", encoding="utf-8")
    with pytest.raises(UserError, match="no <seg>"):
        bleu.read_sentences(path)


NAME = "x.transformer_budgeted.transformer_enfr_2l_128h.translate_enfr_wmt14.beam4.alpha0.6.decodes"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (NAME, {"beam_size": 4, "alpha": 0.6}),
        (NAME + "001", {"beam_size": 4, "alpha": 0.6}),
        ("x.beam10.alpha1e-05.decodes", {"beam_size": 10, "alpha": 1e-05}),
        ("beam4.txt", {}),
        ("averaged-250000", {}),
    ],
)
def test_decoding_in_name(name, expected):
    assert bleu.decoding_in_name(Path("folder.beam9.alpha9.decodes") / name) == expected


@pytest.fixture
def files(tmp_path):
    translation, reference = tmp_path / NAME, tmp_path / "reference"
    write(translation, [*TRANSLATIONS, ""])
    write(reference, [*REFERENCES, "Une dernière phrase."])
    return [f"--translation={translation}", f"--reference={reference}"]


def test_main_prints_a_table(files, capsys):
    assert bleu.main(files) == 0
    out = capsys.readouterr().out
    scores = bleu.scores([*TRANSLATIONS, ""], [*REFERENCES, "Une dernière phrase."])
    printed = [float(number) for number in re.findall(r"^ *(\d+\.\d\d)  ", out, re.MULTILINE)]
    assert printed == [round(value, 2) for value in scores[:5]]
    assert scores.sacrebleu_signature in out
    assert scores.sacrebleu_signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "6, 1 with an empty translation" in out
    assert "beam size             4 (from the translation's file name)" in out
    assert "length penalty alpha  0.6 (from the translation's file name)" in out
    assert "checkpoints averaged  unstated" in out
    assert "tokenised by" not in out


def test_main_states_what_flags_say(files, capsys):
    assert bleu.main([*files, "--beam-size=5", "--alpha=0.6", "--average=8", "--tokenized=reference"]) == 0
    out = capsys.readouterr().out
    assert "beam size             5 (but the translation's file name says 4)\n" in out
    assert "length penalty alpha  0.6\n" in out
    assert "checkpoints averaged  8\n" in out
    assert "reference; detokenised by sacremoses for T2T's BLEU and sacreBLEU\n" in out


def test_main_json(files, capsys):
    assert bleu.main([*files, "--average=8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    scores = bleu.scores([*TRANSLATIONS, ""], [*REFERENCES, "Une dernière phrase."])
    assert report["scores"] == dict(zip(scores._fields[:5], scores[:5]))
    assert report["sacrebleu_signature"] == scores.sacrebleu_signature
    assert (report["sentences"], report["empty_translations"]) == (6, 1)
    assert report["alpha"] == {"value": 0.6, "from": "file name"}
    assert report["checkpoints_averaged"] == {"value": 8, "from": "flag"}


@pytest.mark.parametrize(
    ("translation", "reference", "said"),
    [
        (None, b"un\n", "No such file"),
        (b"un\n", None, "No such file"),
        (b"un\n\xe9t\xe9\n", b"un\ndeux\n", "not UTF-8 text (line 2)"),
        (b"un\n", b"un\ndeux\n", "has 1 sentences but"),
        (b"", b"", "is empty"),
        (b"un\ndeux\n", b"un\n \n", "empty reference (sentence 2)"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, capsys, translation, reference, said):
    for name, content in (("translation", translation), ("reference", reference)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    assert bleu.main([f"--translation={tmp_path}/translation", f"--reference={tmp_path}/reference"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert str(tmp_path) in captured.err


def test_another_environment_gets_one_sentence(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensor2tensor.utils.bleu_hook", None)
    assert bleu.main(files) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tensor2tensor.utils.bleu_hook" in captured.err
    assert "make env-t2t" in captured.err


@pytest.mark.parametrize(
    "flag", ["--beam-size=0", "--beam-size=4.5", "--alpha=-1", "--alpha=nan", "--alpha=x", "--average=0"]
)
def test_bad_flags(files, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        bleu.main([*files, flag])
    assert stop.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err

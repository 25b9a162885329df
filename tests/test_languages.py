"""Any language is known by any of its usual names; metrics are by the languages of the data at hand."""

import json

import pytest
import torch
from small import logged, run, write_world

from aya_min.data import Example, collate, slots_of
from aya_min.languages import CLUSTERS, LANGUAGES, home_language, language_code, read_clusters
from aya_min.files import write_jsonl

ALIASES = {    # what language_code knew when only the languages of the report were let in
    "arb": "ar", "ara": "ar", "zho": "zh", "cmn": "zh", "zh-Hans": "zh", "zh-CN": "zh", "zh-TW": "zh-Hant",
    "ces": "cs", "nld": "nl", "eng": "en", "fra": "fr", "deu": "de", "ell": "el", "heb": "he", "iw": "he",
    "hin": "hi", "ind": "id", "ita": "it", "jpn": "ja", "kor": "ko", "pes": "fa", "fas": "fa", "pol": "pl",
    "por": "pt", "ron": "ro", "rus": "ru", "spa": "es", "tur": "tr", "ukr": "uk", "vie": "vi",
    "Standard Arabic": "ar", "Simplified Chinese": "zh", "Traditional Chinese": "zh-Hant", "Chinese": "zh",
    "Iranian Persian": "fa", "other": "other"
}

# The names and codes of the Aya dataset (65) and of Aya 101 that are not of the 23 languages.
AYA = {
    "Albanian": "sq", "Amharic": "am", "Basque": "eu", "Belarusian": "be", "Bemba": "bem", "Bengali": "bn",
    "Bulgarian": "bg", "Burmese": "my", "Catalan": "ca", "Cebuano": "ceb", "Central Kurdish": "ckb",
    "Danish": "da", "Egyptian Arabic": "arz", "Esperanto": "eo", "Estonian": "et", "Filipino": "fil",
    "Finnish": "fi", "Galician": "gl", "Georgian": "ka", "Gujarati": "gu", "Haitian": "ht",
    "Haitian Creole": "ht", "Hausa": "ha", "Hmong": "hmn", "Hungarian": "hu", "Icelandic": "is", "Igbo": "ig",
    "Irish": "ga", "Javanese": "jv", "Kannada": "kn", "Kazakh": "kk", "Khmer": "km", "Kurdish": "ku",
    "Kyrgyz": "ky", "Lao": "lo", "Latin": "la", "Latvian": "lv", "Lithuanian": "lt", "Luxembourgish": "lb",
    "Macedonian": "mk", "Malagasy": "mg", "Malay": "ms", "Malayalam": "ml", "Maltese": "mt", "Maori": "mi",
    "Marathi": "mr", "Min Nan Chinese": "nan", "Mongolian": "mn", "Moroccan Arabic": "ary",
    "Najdi Arabic": "ars", "Nepali": "ne", "Northern Sotho": "nso", "Norwegian": "no", "Nyanja": "ny",
    "Plateau Malagasy": "mg", "Punjabi": "pa", "Panjabi": "pa", "Samoan": "sm", "Scottish Gaelic": "gd",
    "Serbian": "sr", "Shona": "sn", "Sindhi": "sd", "Sinhala": "si", "Slovak": "sk", "Slovenian": "sl",
    "Somali": "so", "Southern Pashto": "ps", "Pashto": "ps", "Southern Sotho": "st", "Standard Malay": "ms",
    "Sundanese": "su", "Swahili": "sw", "Swedish": "sv", "Ta'izzi-Adeni Arabic": "acq", "Tajik": "tg",
    "Tamil": "ta", "Telugu": "te", "Thai": "th", "Twi": "tw", "Urdu": "ur", "Uzbek": "uz", "Welsh": "cy",
    "West Frisian": "fy", "Sotho": "st", "Western Frisian": "fy", "Wolof": "wo", "Xhosa": "xh",
    "Yiddish": "yi", "Yoruba": "yo", "Zulu": "zu", "Azerbaijani": "az", "Armenian": "hy"
}

# What the cards of the published data sets list: languages of the Aya dataset, of the evaluation suite (the
# collection is translated into the same), and names of parts of aya_collection_language_split.
AYA_DATASET = """
amh arb ary ars acq arz apc ben ceb dan deu ell eng eus fil fin fra gle guj hat hau hin hun ibo ind ita jav
jpn kan kir kor kur lit mal mar mlg msa mya nep nld nso nya pan pes pol por pus rus sin sna snd som spa sqi
srp sun swa swe tam tel tha tur ukr urd vie wol xho yor zho zul"""
AYA_SUITE = """
afr sqi amh ara aze bel ben bul cat ceb ces kur cym dan deu ell eng epo est eus fin fra gla gle glg guj hat
hau heb hin hun hye ibo ind isl ita jav jpn kan kat kaz mon khm kir kor lao lit ltz lav mal mar mkd mlt mri
mya nld nor nep sot pus pes mlg pol por ron rus sin slk slv smo sna snd som spa srp sun swe swa tam tel tgk
tha tur ukr urd uzb vie xho yid yor zho msa zul ace bjn kas kau min mni taq nso acm aeb ajp azb azj"""
AYA_PARTS = """
achinese algerian_arabic balinese banjar bemba cantonese central_kanuri central_khmer central_kurdish
eastern_yiddish egyptian_arabic fon halh_mongolian haitian iranian_persian ligurian madurese
mesopotamian_arabic moroccan_arabic ngaju northern_sotho norwegian_nynorsk"""


@pytest.mark.parametrize("text", [*AYA_DATASET.split(), *AYA_SUITE.split(), *AYA_PARTS.split()])
def test_no_language_of_the_published_aya_data_is_refused(text):
    assert language_code(text)


def test_the_varieties_of_the_aya_data_stay_languages_of_their_own():
    codes = {language_code(text) for text in AYA_DATASET.split()}
    assert len(codes) == len(AYA_DATASET.split()) == 70
    assert {"ar", "ary", "ars", "acq", "arz", "apc"} <= codes


SPELT = {
    "FR": "fr", "french": "fr", " French ": "fr", "fr_Latn": "fr", "eng_Latn": "en", "en-US": "en-US",
    "en_us": "en-US", "pt-BR": "pt-BR", "pt_br": "pt-BR", "Brazilian Portuguese": "pt-BR", "es-419": "es-419",
    "zho_Hans": "zh", "zho_Hant": "zh-Hant", "cmn_Hant": "zh-Hant", "ZH-tw": "zh-Hant", "zh_HK": "zh-Hant",
    "zh-MO": "zh-Hant", "zh-SG": "zh", "zh-Hant-HK": "zh-Hant", "yue_Hant": "yue", "zh-yue": "yue",
    "zh-min-nan": "nan", "arb_Arab": "ar", "kas_Deva": "ks-Deva", "kas_Arab": "ks", "srp_Cyrl": "sr",
    "sr-Latn": "sr-Latn", "sh": "sr-Latn", "jpn_Jpan": "ja", "kor_Hang": "ko", "khk_Cyrl": "mn", "swh": "sw",
    "zsm_Latn": "ms", "lvs": "lv", "ekk": "et", "npi": "ne", "ory": "or", "ger": "de", "fre": "fr",
    "chi": "zh", "per": "fa", "in": "id", "tlh": "tlh", "xyz": "xyz", "i-klingon": "tlh",
    "de-1996": "de-1996", "sl-rozaj-biske": "sl-rozaj-biske", "hi-Latn": "hi-Latn", "en-x-mine": "en-x-mine",
    "x-mine": "x-mine", "und": "other", "Norwegian Bokm\u00e5l": "nb", "Norwegian Bokmal": "nb",
    "Modern Greek (1453-)": "el", "Malay (macrolanguage)": "ms", "N\u2019Ko": "nqo", "Kirghiz": "ky",
    "Farsi": "fa", "Mandarin Chinese": "zh", "haitian-creole": "ht", "Cantonese": "yue", "Castilian": "es",
    "Tagalog": "tl", "tgl": "tl", "fil": "fil"
}

NO_LANGUAGE = [
    "", " ", "xx", "qq", "x", "Klingonese", "English-US", "en_US.UTF-8", "abc-def", "C", "12", "en--us",
    "-en", "en-", "fr,en", "the French language", "\u0444\u0440\u0430\u043d\u0446", "zz-ZZ", "x-",
    "x-toolongapart1"
]


@pytest.mark.parametrize("text, code", [*ALIASES.items(), *AYA.items(), *SPELT.items()])
def test_a_language_has_one_code_however_it_is_spelt(text, code):
    assert language_code(text) == code


def test_the_recipes_languages_keep_their_codes_and_names():
    assert len(LANGUAGES) == 24
    for code, language in LANGUAGES.items():
        assert language_code(code) == language_code(language.name) == code


# As ISO 639-2 writes names, and tags of the BCP 47 registry that are no language, script and region.
OF_ISO = {
    "Spanish; Castilian": "es", "Castilian; Spanish": "es", "Dutch; Flemish": "nl",
    "Catalan; Valencian": "ca",
    "Romanian; Moldavian; Moldovan": "ro", "Chichewa; Chewa; Nyanja": "ny", "Panjabi; Punjabi": "pa",
    "Church Slavic; Old Slavonic; Church Slavonic; Old Bulgarian; Old Church Slavonic": "cu",
    "Greek, Modern (1453-)": "el", "Greek, Ancient (to 1453)": "grc", "Malay, Standard": "ms",
    "Bokmål, Norwegian; Norwegian Bokmål": "nb", "Norwegian Nynorsk; Nynorsk, Norwegian": "nn",
    "Ndebele, North; North Ndebele": "nd", "Sotho, Southern": "st", "Pedi; Sepedi; Northern Sotho": "nso",
    "Limburgan; Limburger; Limburgish": "li", "Navajo; Navaho": "nv", "Divehi; Dhivehi; Maldivian": "dv",
    "Interlingua (International Auxiliary Language Association)": "ia", "Interlingue; Occidental": "ie",
    "Swiss German; Alemannic; Alsatian": "gsw", "Chinese, Min Nan": "nan", "nan": "nan", "zht": "zh-Hant",
    "zhs": "zh", "zh_Hant_TW": "zh-Hant", "pt-br": "pt-BR", "ENG": "en", "en-GB-oed": "en-GB-oxendict",
    "i-ami": "ami", "sgn-BE-FR": "sfb"}


@pytest.mark.parametrize("text, code", OF_ISO.items())
def test_the_names_of_iso_639_and_the_registered_tags_are_languages(text, code):
    """Names with a semicolon or in another order were refused, and zht was a language of its own."""
    assert language_code(text) == code


@pytest.mark.parametrize("text", ["Spanish; French", "Spanish;", "; Spanish", ";", "Spanish; nonsense",
                                  "zh-min", "French, Spanish", "English, Modern",
                                  "Chinese; Traditional Chinese"])
def test_two_languages_in_one_name_are_refused(text):
    """zh-min was Minangkabau."""
    assert language_code(text) is None


@pytest.mark.parametrize("text", NO_LANGUAGE)
def test_what_is_no_language_has_no_code(text):
    assert language_code(text) is None


@pytest.mark.parametrize("code, home", [("pt-BR", "pt"), ("pt", "pt"), ("zh-Hant", "zh-Hant"),
                                        ("sr-Latn", "sr"), ("sw", None), ("de-1996", None)])
def test_a_tag_that_is_in_no_cluster_is_at_home_where_its_language_is(code, home):
    assert home_language(code, {"pt", "zh", "zh-Hant", "sr"}) == home
    assert home_language("pt-BR", {"pt", "pt-BR"}) == "pt-BR"


def test_clusters_name_any_language_by_any_name(tmp_path):
    path = tmp_path / "clusters.json"
    path.write_text(json.dumps({"africa": ["Swahili", "yor", "amh_Ethi"], "west": ["pt-BR", "French"]}),
                    encoding="utf-8")
    assert read_clusters(path) == {"africa": ["sw", "yo", "am"], "west": ["pt-BR", "fr"]}
    path.write_text(json.dumps(CLUSTERS), encoding="utf-8")
    assert read_clusters(path) == CLUSTERS


@pytest.mark.parametrize("text, says",
                         [('{"a": ["sw"], "b": ["Swahili"]}', "language 'sw' is in both 'a' and 'b'"),
                          ('{"a": ["xx"]}', "cluster 'a' has unknown language 'xx'; give a BCP 47 tag"),
                          ('{"a": [["en"]]}', "unknown language"), ('{"a": [5]}', "unknown language 5"),
                          ('{"a": []}', "non-empty list"), ("[]", "not an object"), ("{}", "no cluster"),
                          ('{"a": ["en"], "a": ["fr"]}', "'a' occurs twice"), ("[" * 3000, "not JSON"),
                          ('{"../a": ["en"]}', "cannot name a folder"),
                          ('{"a": ["other"]}', "unknown language")])
def test_wrong_clusters_are_refused_with_the_files_name(text, says, tmp_path):
    path = tmp_path / "clusters.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_clusters(path)
    assert str(error.value).startswith(f"{path}: ") and says in str(error.value)


def test_a_batch_tells_apart_the_languages_that_it_is_given():
    examples = [
        Example(torch.zeros(3).int().numpy(),
                torch.ones(3).bool().numpy(), code) for code in ("sw", "other", "fr", "sw")
    ]
    slots = slots_of(examples)
    assert slots == ("fr", "sw", "other")
    batch = collate(examples, slots=slots)
    assert batch.slots == slots and batch.languages.tolist() == [1, 2, 0, 1
                                                                 ] == batch.to("cpu").languages.tolist()
    assert collate(examples).slots == ("other", ) and collate(examples).languages.tolist() == [0] * 4


def test_metrics_and_evaluation_are_by_the_languages_of_the_data_however_the_batch_is_cut(tmp_path):
    """Rows in Swahili and Quechua were refused, and the metrics had 25 fixed columns."""
    rows = [
        json.loads(line)
        for line in (write_world(tmp_path) / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    names = ["Swahili", "quy", "pt-BR", None]
    for file in ("sft.jsonl", "held-out-sft.jsonl"):
        write_jsonl(tmp_path / file, [{**row, "language": names[i % 4]} for i, row in enumerate(rows)])
    whole, cut = (logged(
        run("sft", tmp_path, tmp_path / f"cut-{size}", micro_batch_size=size, max_steps=2, held_out=True))
                  for size in (8, 1))
    expected = {"loss/sw", "loss/quy", "loss/pt-BR"}
    for a, b in zip(whole, cut, strict=True):
        prefix = "eval/" if "lr" not in a else ""
        assert {key.removeprefix(prefix) for key in a if "loss/" in key} <= expected and a.keys() == b.keys()
        assert prefix == "" or {key for key in a if "loss/" in key} == {prefix + key for key in expected}
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=2e-4), key

"""The sentences on scenes: every pattern, by kind. How to read them is said in `templates`.

Places: a, b, c noun phrases; r, q prepositions of place, m of movement; s, u persons; v, w what s does, x what u does;
p what is done to something; t an adverb; g a comparative.
"""

from __future__ import annotations

from mmattn.data.scenes.templates import Template

_PATTERNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "caption": (
        ("a=new", "{a}", "{a:nom}"),
        ("a=new b=any", "{a} {r} {b}", "{a:nom} {r} {b:dat}"),
        ("a=new b=any c=any", "{a} {r} {b} and {q} {c}", "{a:nom} {r} {b:dat} und {q} {c:dat}"),
        ("a=new", "a/1 picture of {a}", "ein/1 Bild von {a:dat}"),
        ("a=new b=new c=new", "a/1 picture with {a}, {b} and {c}", "ein/1 Bild mit {a:dat}, {b:dat} und {c:dat}"),
    ),
    "statement": (
        ("a=new", "there {a.is} {a}", "es gibt/a.is {a:acc}"),
        ("a=new b=new", "there are/1 {a} and {b}", "es gibt/1 {a:acc} und {b:acc}"),
        ("a=new b=new c=new", "there are/1 {a}, {b} and {c}", "es gibt/1 {a:acc}, {b:acc} und {c:acc}"),
        ("a=any", "the picture shows {a}", "das Bild zeigt {a:acc}"),
        ("a=any", "{s} {v} {a}", "{s} {v} {a:acc} {v.particle}"),
        ("a=any b=any c=any", "{s} {v} {a}, {b} and {c}", "{s} {v} {a:acc}, {b:acc} und {c:acc} {v.particle}"),
        ("a=any b=any", "{s} {v} {a} {r} {b}", "{s} {v} {a:acc} {r} {b:dat} {v.particle}"),
        ("a=any", "{s} {v.past} {a} yesterday", "{s} {v.past} gestern {a:acc} {v.particle}"),
    ),
    "position": (
        ("a=known b=known", "{a} {a.is} {r} {b}", "{a:nom} {a.is} {r} {b:dat}"),
        ("a=any b=known", "{a} {a.lies} {r} {b}", "{a:nom} {a.lies} {r} {b:dat}"),
        (
            "a=known b=known c=known",
            "{a} {a.lies} {r} {b} and {q} {c}",
            "{a:nom} {a.lies} {r} {b:dat} und {q} {c:dat}",
        ),
        (
            "a=known b=known c=any",
            "{a} {a.is} between {b} and {c}",
            "{a:nom} {a.is} zwischen {b:dat} und {c:dat}",
        ),
        ("a=known b=known", "{a} {a.resembles} {b}", "{a:nom} {a.resembles} {b:dat}"),
        ("a=known", "{a.sized} {a.is} {a.color}", "{a.sized:nom} {a.is} {a.color}"),
        (
            "a=known b=known",
            "{a.sized} {r} {b} {a.is} {a.color}",
            "{a.sized:nom} {r} {b:dat} {a.is} {a.color}",
        ),
    ),
    "negation": (
        ("a=no", "there {a.is} {a}", "es gibt/a.is {a:acc}"),
        ("a=no b=known", "there {a.is} {a} {r} {b}", "es gibt/a.is {a:acc} {r} {b:dat}"),
        ("a=definite b=known", "{a} {a.is} not {r} {b}", "{a:nom} {a.is} nicht {r} {b:dat}"),
        ("a=definite", "{s} {s.does}/v@2 not {v.base} {a}", "{s} {v} {a:acc} nicht {v.particle}"),
        ("a=no", "{s} {v} {a}", "{s} {v} {a:acc} {v.particle}"),
        ("a=a b=a", "there is/1 neither {a} nor {b}", "es gibt/1 weder {a:acc} noch {b:acc}"),
        ("a=one b=one", "{s} {v} not {a} but {b}", "{s} {v} nicht {a:acc}, sondern {b:acc} {v.particle}"),
        ("a=definite", "{a.sized} {a.is} not {a.color}", "{a.sized:nom} {a.is} nicht {a.color}"),
        (
            "a=definite b=definite c=definite",
            "{a} {a.is} {r} {b} but not {q} {c}",
            "{a:nom} {a.is} {r} {b:dat}, aber nicht {q} {c:dat}",
        ),
    ),
    "inversion": (
        ("a=new b=known", "{r} {b} there {a.is} {a}", "{r} {b:dat} gibt/a.is es {a:acc}"),
        ("a=any b=known", "{r} {b} the picture shows {a}", "{r} {b:dat} zeigt das Bild {a:acc}"),
        ("a=any b=known", "{r} {b} {s} {v} {a}", "{r} {b:dat} {v} {s} {a:acc} {v.particle}"),
        ("a=any", "{t} {s} {v} {a}", "{t} {v} {s} {a:acc} {v.particle}"),
        (
            "a=new b=known c=known",
            "between {b} and {c} there {a.is} {a}",
            "zwischen {b:dat} und {c:dat} gibt/a.is es {a:acc}",
        ),
        (
            "a=new b=known c=known",
            "{r} {b} and {q} {c} {a.lies} {a}",
            "{r} {b:dat} und {q} {c:dat} {a.lies} {a:nom}",
        ),
        ("a=any", "yesterday {s} {v.past} {a}", "gestern {v.past} {s} {a:acc} {v.particle}"),
        ("a=any b=any", "{t} {s} {v} {a} and {b}", "{t} {v} {s} {a:acc} und {b:acc} {v.particle}"),
    ),
    "relative": (
        (
            "a=definite b=known",
            "{a.sized} {a.that} {a.is} {r} {b} {a.is#2} {a.color}",
            "{a.sized:nom}, {a.that:nom} {r} {b:dat} {a.is}, {a.is#2} {a.color}",
        ),
        (
            "a=definite b=known",
            "{a} {a.that} {s} {v} {a.is} {r} {b}",
            "{a:nom}, {a.that:acc} {s} {v.final}, {a.is} {r} {b:dat}",
        ),
        (
            "a=any b=known",
            "{s} {v} {a} {a.that} {a.is} {r} {b}",
            "{s} {v} {a:acc} {v.particle}, {a.that:nom} {r} {b:dat} {a.is}",
        ),
        (
            "a=new b=definite",
            "{b.colored} {r} {b.which} there {a.is} {a} {b.is} {b.size}",
            "{b.colored:nom}, {r} {b.which:dat} es {a:acc} gibt/a.is, {b.is} {b.size}",
        ),
        (
            "a=new b=known c=known",
            "there {a.is} {a} {a.that} {a.is#2} {r} {b} and {q} {c}",
            "es gibt/a.is {a:acc}, {a.that:nom} {r} {b:dat} und {q} {c:dat} {a.is#2}",
        ),
        ("a=one", "it is/1 {a} {a.that} {s} {v}", "es ist/1 {a:nom}, {a.that:acc} {s} {v.final}"),
        (
            "a=definite b=definite c=known",
            "{a.colored} {a.that} {a.is} {r} {b} {b.that} {b.is} {q} {c} {a.is#2} {a.size}",
            "{a.colored:nom}, {a.that:nom} {r} {b:dat} {a.is}, {b.that:nom} {q} {c:dat} {b.is}, {a.is#2} {a.size}",
        ),
        (
            "a=definite b=definite",
            "{a} {a.that} {s} {v} {a.resembles} {b} {b.that} {u} {x}",
            "{a:nom}, {a.that:acc} {s} {v.final}, {a.resembles} {b:dat}, {b.that:acc} {u} {x.final}",
        ),
    ),
    "subordinate": (
        (
            "a=known b=known",
            "{s} {s.knows} that {a} {a.is} {r} {b}",
            "{s} {s.knows}, dass {a:nom} {r} {b:dat} {a.is}",
        ),
        ("a=new", "{s} {s.thinks} that there {a.is} {a}", "{s} {s.thinks}, dass es {a:acc} gibt/a.is"),
        (
            "a=definite b=known",
            "{s} {v} {a} because {a.it} {a.is} {r} {b}",
            "{s} {v} {a:acc} {v.particle}, weil {a.it:nom} {r} {b:dat} {a.is}",
        ),
        (
            "a=definite",
            "if {s} {v} {a}, {s.pronoun} {w.split} {a.him} {w.out}",
            "wenn {s} {a:acc} {v.final}, {w} {s.pronoun} {a.him:acc} {w.particle}",
        ),
        (
            "a=known b=known c=any",
            "although {a} {a.is} {r} {b}, {s} {v} {c}",
            "obwohl {a:nom} {r} {b:dat} {a.is}, {v} {s} {c:acc} {v.particle}",
        ),
        (
            "a=known b=known",
            "{s} {s.asks} whether {a} {a.is} {r} {b}",
            "{s} {s.asks}, ob {a:nom} {r} {b:dat} {a.is}",
        ),
        (
            "a=any b=known",
            "{s} {s.says} that {u} {x} {a} {r} {b}",
            "{s} {s.says}, dass {u} {a:acc} {r} {b:dat} {x.final}",
        ),
        (
            "a=any b=any",
            "because {s} {v} {a}, {u} {x} {b}",
            "weil {s} {a:acc} {v.final}, {x} {u} {b:acc} {x.particle}",
        ),
    ),
    "question": (
        ("a=known b=known", "{a.is} {a} {r} {b}?", "{a.is} {a:nom} {r} {b:dat}?"),
        ("a=known", "where {a.is} {a}?", "wo {a.is} {a:nom}?"),
        ("a=bare", "how many {a} are/1 there?", "wie viele {a:acc} gibt/1 es?"),
        ("a=bare b=known", "how many {a} {a.is} {r} {b}?", "wie viele {a:nom} {a.is} {r} {b:dat}?"),
        ("a=known b=the", "what color {b.has} {b.bare} {r} {a}?", "welche Farbe {b.has} {b.bare:nom} {r} {a:dat}?"),
        ("a=any", "{s.does}/v@2 {s} {v.base} {a}?", "{v} {s} {a:acc} {v.particle}?"),
        ("a=which b=known", "{a} {a.is} {r} {b}?", "{a:nom} {a.is} {r} {b:dat}?"),
        ("a=which", "{a} {s.does}/v@2 {s} {v.base}?", "{a:acc} {v} {s} {v.particle}?"),
        ("a=definite", "{a.is} {a.sized} {a.color} or {a.color2}?", "{a.is} {a.sized:nom} {a.color} oder {a.color2}?"),
        ("a=new b=known", "{a.is} there {a} {r} {b}?", "gibt/a.is es {a:acc} {r} {b:dat}?"),
        ("a=any", "why {s.does}/v@2 {s} {v.base} {a}?", "warum {v} {s} {a:acc} {v.particle}?"),
    ),
    "comparison": (
        ("a=known:plain b=known:plain", "{a} {a.is} {g} than {b}", "{a:nom} {a.is} {g} als {b:nom}"),
        (
            "a=known:plain b=known:plain",
            "{a} {a.is} as/1 large/2 as/3 {b}",
            "{a:nom} {a.is} so/1 groß/2 wie/3 {b:nom}",
        ),
        (
            "a=definite:plain b=definite:plain",
            "{a} {a.is} not as/1 small/2 as/3 {b}",
            "{a:nom} {a.is} nicht so/1 klein/2 wie/3 {b:nom}",
        ),
        (
            "a=new:plain b=known:plain",
            "there {a.is} {a} {a.that} {a.is#2} {g} than {b}",
            "es gibt/a.is {a:acc}, {a.that:nom} {g} als {b:nom} {a.is#2}",
        ),
        ("a=the:superlative b=known", "{a} {a.is} {r} {b}", "{a:nom} {a.is} {r} {b:dat}"),
        ("a=the:superlative", "{s} {v} {a}", "{s} {v} {a:acc} {v.particle}"),
        (
            "a=a:comparative b=known",
            "{s} {v} {a} {r} {b}",
            "{s} {v} {a:acc} {r} {b:dat} {v.particle}",
        ),
        (
            "a=known:plain b=known:plain c=known:plain",
            "{a} {a.is} larger/1 than {b} but smaller/2 than {c}",
            "{a:nom} {a.is} größer/1 als {b:nom}, aber kleiner/2 als {c:nom}",
        ),
    ),
    "pronoun": (
        (
            "a=definite",
            "{s} {v} {a} and {w.split} {a.him} {w.out}",
            "{s} {v} {a:acc} {v.particle} und {w} {a.him:acc} {w.particle}",
        ),
        (
            "a=definite b=known",
            "{a.colored} {a.is} {a.size} and {a.it} {a.is#2} {r} {b}",
            "{a.colored:nom} {a.is} {a.size} und {a.it:nom} {a.is#2} {r} {b:dat}",
        ),
        (
            "a=new b=new",
            "there {a.is} {a} and {r} {a.him} there {b.is} {b}",
            "es gibt/a.is {a:acc} und {r} {a.him:dat} gibt/b.is es {b:acc}",
        ),
        (
            "a=definite",
            "{u} {x} {a}, but {s} {s.does}/v@2 not {v.split_base} {a.him} {v.out}",
            "{u} {x} {a:acc} {x.particle}, aber {s} {v} {a.him:acc} nicht {v.particle}",
        ),
        (
            "a=definite b=definite c=any",
            "{a} {a.is} {r} {b} and {q} {a.him} {c.lies} {c}",
            "{a:nom} {a.is} {r} {b:dat} und {q} {a.him:dat} {c.lies} {c:nom}",
        ),
    ),
    "movement": (
        ("a=any b=known", "{s} {s.places} {a} {m} {b}", "{s} {s.places} {a:acc} {m} {b:m}"),
        ("a=any b=known", "{s} {s.placed} {a} {m} {b}", "{s} {s.placed} {a:acc} {m} {b:m}"),
        (
            "a=any b=known c=known",
            "{s} {s.places} {a} between {b} and {c}",
            "{s} {s.places} {a:acc} zwischen {b:acc} und {c:acc}",
        ),
        ("a=any b=known", "{s} {s.has} placed/1 {a} {m} {b}", "{s} {s.has} {a:acc} {m} {b:m} gelegt/1"),
        ("a=any b=known", "{t} {s} {s.places} {a} {m} {b}", "{t} {s.places} {s} {a:acc} {m} {b:m}"),
    ),
    "bracket": (
        ("a=any", "{s} {s.has} {v.participle} {a}", "{s} {s.has} {a:acc} {v.participle}"),
        ("a=any b=known", "{s} {s.can} {v.base} {a} {r} {b}", "{s} {s.can} {a:acc} {r} {b:dat} {v.infinitive}"),
        (
            "a=any b=any",
            "{s} {s.wants} to/v@0 {v.base} {a} and {b}",
            "{s} {s.wants} {a:acc} und {b:acc} {v.infinitive}",
        ),
        ("a=definite", "{s} {s.has} not {v.participle} {a}", "{s} {s.has} {a:acc} nicht {v.participle}"),
        (
            "a=any b=known",
            "{t} {s} {s.has} {v.participle} {a} {r} {b}",
            "{t} {s.has} {s} {a:acc} {r} {b:dat} {v.participle}",
        ),
        ("a=any", "{a} {a.was} {p.participle} by {s.object}", "{a:nom} {a.was} von {s.object} {p.participle}"),
        (
            "a=known b=any",
            "{s} {s.knows} that {u} {u.has} {p.participle} {a} and {b}",
            "{s} {s.knows}, dass {u} {a:acc} und {b:acc} {p.participle} {u.has}",
        ),
    ),
    "genitive": (
        ("a=of", "the color of/a@0 {a.sized} is/1 {a.color}", "die Farbe {a.sized:gen} ist/1 {a.color}"),
        (
            "a=of b=known",
            "the center of/a@0 {a} is/1 {r} {b}",
            "die Mitte {a:gen} ist/1 {r} {b:dat}",
        ),
        ("a=of", "{s} {v} the center of/a@0 {a}", "{s} {v} die Mitte {a:gen} {v.particle}"),
        ("a=of b=any", "because/1 of/1 {a} {s} {v} {b}", "wegen/1 {a:gen} {v} {s} {b:acc} {v.particle}"),
        ("a=of b=any", "instead/1 of/1 {a} {s} {v} {b}", "statt/1 {a:gen} {v} {s} {b:acc} {v.particle}"),
    ),
}

TEMPLATES = {
    kind: tuple(Template(kind, places, english, german) for places, english, german in patterns)
    for kind, patterns in _PATTERNS.items()
}
"""Every pattern, by kind."""

KINDS = tuple(TEMPLATES)

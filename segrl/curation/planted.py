"""Bad texts, planted on purpose: how many of them do rules and judges catch?

Nothing here is shared with the rules: wordings are written out, as models have been seen to write them, and the only
knowledge is that of the case. `KINDS` are the families of faults that rules look for.
"""

# x1, y1, x2, y2 of a box in pixels; W, H of the image

from __future__ import annotations

import random
from collections.abc import Callable

from segrl.curation.facts import Facts
from segrl.errors import unknown_name

__all__ = ["KINDS", "plant"]

_POSITIONS = (
    "It is located at [{x1}, {y1}, {x2}, {y2}].",
    "Its bounding box is ({x1}, {y1}, {x2}, {y2}).",
    "The lesion spans from ({x1}, {y1}) to ({x2}, {y2}).",
    "bbox: {x1} {y1} {x2} {y2}.",
    '{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "{lesion}"}}',
    "<box>({x1},{y1}),({x2},{y2})</box> encloses it.",
    "<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
    "The region <loc_{x1}><loc_{y1}><loc_{x2}><loc_{y2}> is abnormal.",
    "Its centre lies at x={cx}, y={cy}.",
    "The centre of the finding is roughly x: {cx} and y: {cy}.",
    "Coordinates: x1 = {x1}, y1 = {y1}, x2 = {x2}, y2 = {y2}.",
    "It extends from x {x1} to {x2} and from y {y1} to {y2}.",
    "The finding sits around pixel {cx}, {cy}.",
    "It begins {x1} pixels from the left edge and {y1} pixels from the top edge.",
    "It starts roughly {x1} px in from the left margin.",
    "Its upper border is at row {y1} and its left border at column {x1}.",
    "The abnormality occupies rows {y1} to {y2} of the image.",
    "Columns {x1} through {x2} contain the lesion.",
    "Its centre is about {px} % from the left and {py} % from the top.",
    "The lesion is centred at {px}% of the image width and {py}% of its height.",
    "It lies {px} percent of the way across the picture.",
    "Horizontally it covers {pa}% to {pb}% of the frame.",
    "In normalised coordinates its centre is {fx:.2f}, {fy:.2f}.",
    "Relative position (0 to 1): {fx:.3f} horizontally, {fy:.3f} vertically.",
    "Top-left corner {x1}/{y1}, bottom-right corner {x2}/{y2}.",
    "Box: {x1}-{y1}-{x2}-{y2}.",
    "left: {x1}, top: {y1}, right: {x2}, bottom: {y2}.",
    "xmin={x1} ymin={y1} xmax={x2} ymax={y2}.",
    "The point ({cx}; {cy}) is inside the lesion.",
    "At {{{x1}, {y1}, {x2}, {y2}}} the texture changes.",
    "The contour runs through {x1},{y1} {x2},{y1} {x2},{y2}.",
    "The lesion has its middle at {cx} by {cy} in an image of {W} by {H}.",
    "A patch of {w} x {h} pixels is affected.",
    "It is {w} pixels wide and {h} pixels high.",
    "Its position is ［{x1}，{y1}，{x2}，{y2}］.",
    "⟨{cx}, {cy}⟩ marks its middle.",
    "The abnormal area is located at X:{cx} Y:{cy}.",
    "With the origin in the upper left, the lesion is at {cx} horizontally and {cy} vertically.",
    "Scaled to a thousand, the box would be {kx1}, {ky1}, {kx2}, {ky2}.",
    "Its vertical extent is y = {y1} – {y2}.",
    "Around the {px}th percentile of the width, the texture changes.",
    "An area that begins a third (33 %) of the way down the image is abnormal.",
)
_FOREIGN = (
    "Der Befund hebt sich durch eine unregelmäßige Begrenzung vom umgebenden Gewebe ab und ist gut zu erkennen.",
    "Im restlichen Bild zeigt sich ein unauffälliges Gewebe ohne weitere Herde.",
    "La lésion se distingue du tissu voisin par ses contours irréguliers et son aspect hétérogène.",
    "Le reste de l'image ne montre aucune anomalie visible.",
    "La lesión se diferencia del tejido circundante por sus bordes irregulares y su aspecto heterogéneo.",
    "El resto de la imagen no muestra alteraciones relevantes.",
    "La lesione si distingue dal tessuto circostante per i margini irregolari e l'aspetto disomogeneo.",
    "A lesão distingue-se do tecido vizinho pelas margens irregulares e pelo aspeto heterogéneo.",
    "De afwijking onderscheidt zich van het omliggende weefsel door een onregelmatige begrenzing.",
    "Zmiana odróżnia się od otaczającej tkanki nieregularnymi brzegami i niejednorodną strukturą.",
    "Образование отличается от окружающей ткани неровными контурами и неоднородной структурой.",
    "病灶边缘不规则，与周围正常组织分界清楚，内部回声不均匀。",
    "病変は辺縁が不整で、周囲の正常組織とは明らかに異なる。",
    "병변은 경계가 불규칙하며 주변 정상 조직과 뚜렷하게 구별된다.",
    "تتميز الآفة عن الأنسجة المحيطة بحواف غير منتظمة ومظهر غير متجانس.",
    "घाव के किनारे अनियमित हैं और यह आसपास के ऊतक से अलग दिखता है।",
    "Lezyon, düzensiz kenarları ve heterojen görünümü ile çevre dokudan ayrılmaktadır.",
    "Tổn thương có bờ không đều và khác biệt rõ với mô xung quanh.",
)
_GENERIC = (
    "The image shows anatomical structures of the region under study. Some areas may be abnormal while others appear "
    "to be within normal limits. A careful and systematic evaluation of all structures leads to the conclusion that "
    "the requested target can be identified in this image.",
    "To answer the question, the picture is first inspected as a whole and then in detail. Based on this inspection "
    "the region in question differs from what surrounds it, and it is therefore selected as the final result.",
    "Looking at the scan, one region stands out from its surroundings. Since it differs from the expected appearance, "
    "it is the structure that is being asked about, and the remaining regions can be ruled out.",
)
_CHATTER = (
    "As an AI language model, I cannot provide a medical diagnosis.",
    "I'm sorry, but I can't help with the interpretation of medical images.",
    "Please consult a qualified healthcare professional for a proper diagnosis.",
    "I hope this description is useful! Let me know if you need anything else.",
    "Sure! Here is the description you asked for:",
    "Certainly, below is a step-by-step analysis of the image you provided.",
    "Note that this is not medical advice and should not replace a radiologist.",
    "Unfortunately, I am unable to view images directly.",
    "Is there anything else you would like me to describe?",
    "As requested, I have avoided mentioning any coordinates in my answer.",
)
_CHARACTERISTIC = {  # words that only one kind of picture deserves
    "ct": ("Its attenuation is about 45 Hounsfield units.", "On this CT slice the lesion is hypodense."),
    "mr": ("On this T1-weighted sequence it is hypointense.", "It is bright on FLAIR and restricts diffusion."),
    "ultrasound": (
        "The lesion is hypoechoic with posterior acoustic shadowing.",
        "This sonogram shows an anechoic area.",
    ),
    "x-ray": ("On this chest radiograph an opacity is seen.", "The radiograph shows a rounded opacity."),
    "dermoscopy": ("Dermoscopy reveals an atypical pigment network.", "The dermoscopic picture shows blue-white veil."),
    "endoscopy": ("The endoscopic view shows a pedunculated polyp.", "Endoscopy shows reddened mucosa with a lesion."),
    "fundus": (
        "This fundus photograph shows a lesion near the optic disc.",
        "The macula shows a lesion on funduscopy.",
    ),
    "histology": (
        "On H&E staining the nuclei of the lesion are enlarged.",
        "Under the microscope the glands are atypical.",
    ),
}
_OPPOSITE = {"left": "right", "right": "left", "upper": "lower", "lower": "upper"}
_SIDES = (
    "The {lesion} is seen in the {side} part of the image.",
    "On the {side} side of the picture there is the {lesion}.",
    "It lies towards the {side} edge of the image.",
    "The abnormality is confined to the {side} half of the frame.",
    "Attention is drawn to the {side} third of the image, where the {lesion} is.",
)
_MANY = (
    "In total there are {n} separate lesions.",
    "{N} distinct foci of {lesion} can be counted.",
    "One sees {n} lesions of this kind.",
    "Altogether {n} such findings are present.",
)
_ONE = ("Only a single lesion is present.", "This is a solitary finding.", "There is exactly one lesion in the image.")
_LARGE = ("It is a very large lesion that fills most of the image.", "The {lesion} is huge.",
          "A large lesion dominates the picture.", "The lesion takes up more than half of the image.")  # fmt: skip
_TINY = ("It is a tiny lesion that is easily overlooked.", "The {lesion} is very small.",
         "A minute focus is all that can be seen of the lesion.", "The lesion is a small spot.")  # fmt: skip
_COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}


def plant(text: str, facts: Facts, kind: str, rng: random.Random) -> str:
    """Return a text with a fault of one kind.

    Args:
        text: Without a fault.
        facts: Of its case.
        kind: One of `KINDS`.
        rng: Chooses the wording.

    Raises:
        UnknownNameError: No such kind.

    Example:
        >>> facts = Facts("cyst", "Breast", "Ultrasound", 1, "small", "upper left part", (0.1, 0.1, 0.2, 0.2))
        >>> plant("The cyst is dark and round.", facts, "contradiction", random.Random(3))
        'The cyst is dark and round. It is a very large lesion that fills most of the image.'
    """
    if kind not in _PLANT:
        raise unknown_name("kind of fault", kind, _PLANT)
    return _PLANT[kind](text, facts, rng)


def _added(text: str, sentence: str, rng: random.Random) -> str:
    """Put a sentence between two others, or before or after all of them."""
    sentences = text.split(". ")
    at = rng.randint(0, len(sentences))
    if at == len(sentences):
        return f"{text} {sentence}"
    return ". ".join(sentences[:at]) + (". " if at else "") + sentence + " " + ". ".join(sentences[at:])


def _coordinates(text: str, facts: Facts, rng: random.Random) -> str:
    width, height = rng.choice(((256, 256), (512, 512), (640, 480), (1024, 768)))
    left, top, right, bottom = facts.extent
    x1, y1, x2, y2 = int(left * width), int(top * height), int(right * width) + 2, int(bottom * height) + 2
    across, down = (left + right) / 2, (top + bottom) / 2
    numbers = {
        "x1": x1, "y1": y1, "x2": x2, "y2": y2, "cx": (x1 + x2) // 2, "cy": (y1 + y2) // 2, "W": width, "H": height,
        "w": x2 - x1, "h": y2 - y1, "fx": across, "fy": down, "px": round(100 * across), "py": round(100 * down),
        "pa": round(100 * left), "pb": round(100 * right), "kx1": round(1000 * left), "ky1": round(1000 * top),
        "kx2": round(1000 * right), "ky2": round(1000 * bottom),
    }  # fmt: skip
    return _added(text, rng.choice(_POSITIONS).format(lesion=facts.lesion, **numbers), rng)


def _length(text: str, facts: Facts, rng: random.Random) -> str:
    words = text.split()
    choice = rng.randrange(4)
    if choice == 0:
        return f"The {facts.lesion} is visible."
    if choice == 1:
        return " ".join(words[: rng.randint(1, 5)])
    if choice == 2:
        return facts.lesion
    place, sights = facts.anatomy or "tissue", ("texture", "shading", "contour", "gradient")
    rambling = [
        f"Another look at the {place}, item {word} of a long list of impressions, adds some {rng.choice(sights)} to it"
        for word in words * 6
    ]
    return f"{text} {'. '.join(rambling)}."


def _format(text: str, facts: Facts, rng: random.Random) -> str:
    sentences = text.split(". ")
    return rng.choice(
        (
            f"<think>{text}</think>",
            f"{text}</think>",
            f"<think>{text}",
            f"{text} <answer>The {facts.lesion} is marked.</answer>",
            f"{text} <seg>",
            f"## Findings\n{text}\n## Impression\n{sentences[0]}.",
            "\n".join(f"- {sentence}" for sentence in sentences),
            "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1)),
            f"**Perception:** {text}",
            f"```\n{text}\n```",
            f'{{"reasoning": "{text}"}}',
            f"Assistant: {text}",
            f"{text}<|im_end|>",
            f"Step 1: {text}\nStep 2: done",
        )
    )


def _contradiction(text: str, facts: Facts, rng: random.Random) -> str:
    options: list[str] = []
    own = facts.modality.casefold()
    foreign = [kind for kind in _CHARACTERISTIC if kind not in own and not (kind == "mr" and "mr" in own)]
    options.append(rng.choice(_CHARACTERISTIC[rng.choice(foreign)]))
    if wrong := [_OPPOSITE[word] for word in facts.location.split() if word in _OPPOSITE]:
        options.append(rng.choice(_SIDES).format(side=rng.choice(wrong), lesion=facts.lesion))
    if facts.count == 1:
        count = _COUNTS[rng.randint(2, 7)]
        options.append(rng.choice(_MANY).format(n=count, N=count.capitalize(), lesion=facts.lesion))
    else:
        options.append(rng.choice(_ONE))
    if facts.size != "medium":
        options.append(rng.choice(_LARGE if facts.size == "small" else _TINY).format(lesion=facts.lesion))
    return _added(text, rng.choice(options), rng)


def _language(text: str, facts: Facts, rng: random.Random) -> str:
    sentence = rng.choice(_FOREIGN)
    return sentence + " " + rng.choice(_FOREIGN) if rng.random() < 0.5 else _added(text, sentence, rng)


def _boilerplate(text: str, facts: Facts, rng: random.Random) -> str:
    choice = rng.randrange(4)
    if choice == 0:
        return rng.choice(_GENERIC)
    if choice == 1:
        sentence = text.split(". ")[0].rstrip(".") + "."
        return " ".join([sentence] * rng.randint(3, 9))
    if choice == 2:
        return f"{text} {rng.choice(_CHATTER)}"
    return f"{rng.choice(_CHATTER)} {text}"


_PLANT: dict[str, Callable[[str, Facts, random.Random], str]] = {
    "coordinates": _coordinates,
    "length": _length,
    "format": _format,
    "contradiction": _contradiction,
    "language": _language,
    "boilerplate": _boilerplate,
}
KINDS = tuple(_PLANT)

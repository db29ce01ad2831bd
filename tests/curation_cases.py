"""Small cases for tests of curation, and a server's replies to them: a function of the request alone."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from chat_server import Fault, text_of
from PIL import Image

from segrl.curation.case import Case, write_cases

PLACES = ("upper left", "upper right", "lower left", "lower right")


def make_cases(folder: Path, count: int) -> list[Case]:
    """Write images of one bright or dark square each, and `cases.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, cases = np.random.default_rng(0), []
    for number in range(count):
        grey = rng.normal(100, 6, (64, 64))
        mask = np.zeros((64, 64), dtype=bool)
        y, x = 4 + 36 * (number % 4 // 2), 4 + 36 * (number % 2)
        mask[y : y + 14, x : x + 12 + number % 5] = True
        grey[mask] += 60 if number % 3 else -60
        paths = folder / f"{number}.png", folder / f"{number}_mask.png"
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(paths[0])
        Image.fromarray(mask).save(paths[1])
        lesion = ("cyst", "nodule", "abscess")[number % 3]
        cases.append(Case(f"{number:016x}", *paths, "mine", f"p{number}", "Ultrasound", "Breast", lesion, "CC0-1.0"))
    write_cases(folder / "cases.jsonl", cases)
    return cases


def code(request: dict[str, Any]) -> str:
    """A word of ten letters that stands for a request."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return "q" + "".join(chr(ord("a") + int(digit, 16)) for digit in digest[:9])


def good_reply(request: dict[str, Any]) -> str:
    """A text or a verdict; three verdicts in ten ask for another text."""
    prompt, word = text_of(request), code(request)
    if "Score three parts" in prompt:
        good = ord(word[1]) - ord("a") >= 5
        scores = {"normal": 1.0, "lesion": 0.9 if good else 0.4, "reasoning": 0.9}
        return json.dumps({**scores, "remarks": "" if good else f"Say more of the outline ({word})."})
    if "Describe in plain" in prompt:
        lesion = re.search(r"annotation: \w+ (\w+),", prompt)
        first = f"The {word} layers of the breast are regular."
        return f"{first} The {lesion and lesion[1]} has an even texture, as {word} does."
    place = re.search(r"in the ([\w ]+) part:", prompt)
    return f"It lies in the {place and place[1]} part of the image. Unlike a vessel it ends within the {word} tissue."


def faulty_reply(request: dict[str, Any], attempt: int) -> Any:
    """Good replies, but for one request in three: faults that pass, and faults that stay."""
    word, text = code(request), good_reply(request)
    kind = sum(map(ord, word)) % 24
    passing = {0: Fault(429), 1: Fault(500), 2: Fault(503)}
    staying = {
        3: Fault(refusal=f"I cannot help ({word})."), 4: Fault(finish="length", text=f'{{"normal": 1, "lesi{word}'),
        5: Fault(text=" "), 6: Fault(text=f"Der Befund {word} ist gut vom Gewebe abgegrenzt und liegt im oberen Teil."),
        7: Fault(500),
    }  # fmt: skip
    if kind in passing and attempt == 1:
        return passing[kind]
    return staying.get(kind, Fault(text=text))

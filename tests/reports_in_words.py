"""Good texts of many wordings, written without a look at the rules, with what rules must not take for faults.

They hold measurements, ages, grades, clock positions, sides of the body, normal structures on the other side of the
picture, negations, differential diagnoses and other modalities that would help.
"""

import random

from segrl.curation.facts import Facts

LESIONS = {
    "CT": ("Abdomen", ("liver tumour", "renal cyst", "pancreatic mass")),
    "MRI": ("Head", ("glioma", "meningioma", "metastasis")),
    "Ultrasound": ("Breast", ("breast nodule", "malignant mass", "fibroadenoma")),
    "X-ray": ("Lung", ("opacity", "pulmonary nodule", "consolidation")),
    "Dermoscopy": ("Skin", ("melanoma", "skin lesion", "nevus")),
    "Endoscopy": ("Abdomen", ("polyp", "ulcer", "adenoma")),
    "Fundus photography": ("Eye", ("hard exudates", "haemorrhage", "optic disc lesion")),
}
NORMAL = {
    "CT": (
        "The parenchyma enhances homogeneously elsewhere.",
        "Vessels and fat planes are of normal attenuation.",
        "No free fluid is seen around the bowel loops.",
        "Bone windows would show no destruction of the L4-L5 level.",
    ),
    "MRI": (
        "The ventricles are of normal width and the midline is not shifted.",
        "Grey and white matter are well differentiated on the remaining slice.",
        "The contralateral hemisphere has normal signal.",
        "The 2 lateral ventricles are symmetric.",
    ),
    "Ultrasound": (
        "The fatty and glandular layers are regular outside of the finding.",
        "Skin and subcutaneous fat show their usual echo pattern.",
        "The pectoral muscle is intact in the depth.",
        "Cooper ligaments run undisturbed at the 3 o'clock position.",
    ),
    "X-ray": (
        "Heart and mediastinum are of normal width.",
        "Both costophrenic angles are free.",
        "Ribs and clavicles are intact.",
        "The 6th rib is unremarkable, as are the two hila.",
    ),
    "Dermoscopy": (
        "The surrounding skin shows regular furrows and a few hairs.",
        "Perilesional skin is evenly coloured.",
        "Away from it the pigment is uniform.",
        "Small vessels run beneath the healthy skin.",
    ),
    "Endoscopy": (
        "The mucosa around it is pink and glistening.",
        "Folds are regular and the vascular pattern is visible.",
        "A small amount of fluid covers the wall.",
        "The lumen is wide open in the distance.",
    ),
    "Fundus photography": (
        "The retinal vessels taper normally.",
        "The macula has its usual darker tone.",
        "Arteries and veins cross without compression.",
        "The disc margin is sharp.",
    ),
}
LOOK = {
    "CT": (
        "It is hypodense to the organ.",
        "It enhances by about 35 HU.",
        "Its rim is thick and enhances in the late phase.",
        "About 20 % of its volume is necrotic.",
    ),
    "MRI": (
        "It is bright on T2 and dark on T1.",
        "It has an ADC of 0.9 and shows rim enhancement.",
        "Oedema of 8 mm surrounds it.",
        "Its signal is heterogeneous with a cystic part.",
    ),
    "Ultrasound": (
        "It is hypoechoic and taller than wide.",
        "Its margin is spiculated and it casts a shadow.",
        "It measures 12 x 9 mm and is rated BI-RADS 4.",
        "Its echoes are heterogeneous; it is 1.4 cm long.",
    ),
    "X-ray": (
        "Its outline is fuzzy.",
        "It is denser than the adjacent lung.",
        "It has a diameter of 2.5 cm.",
        "Its density hides the vessels behind it.",
    ),
    "Dermoscopy": (
        "Its borders are notched and three colours are present.",
        "It shows an atypical network and dots.",
        "It is 7 mm wide, asymmetric in 2 axes.",
        "Its pigment varies between brown and black.",
    ),
    "Endoscopy": (
        "It is raised and its surface is lobulated.",
        "Its pit pattern is type IIIs.",
        "It is sessile, Paris Is, some 6 mm high.",
        "It is redder than its base.",
    ),
    "Fundus photography": (
        "They are yellow and waxy with sharp edges.",
        "It is dark red and flame-shaped.",
        "It covers less than 1 disc diameter.",
        "Its edge is feathery.",
    ),
}
PLACE = (
    "The {lesion} lies in the {place} of the image.",
    "In the {place} of the picture there is {article} {lesion}.",
    "Attention goes to the {place}, where the {lesion} is found.",
    "The finding in the {place} is the {lesion}.",
    "{Article} {lesion} can be made out in the {place} of the frame.",
)
COUNT_ONE = ("It is the only one.", "No second focus is seen.", "It is solitary.", "Other lesions are absent.", "")
COUNT_MANY = (
    "There are {n} of them.",
    "{N} lesions are present.",
    "They are {n} in number.",
    "Several lesions are seen.",
    "",
)
SIZE = {
    "small": (
        "It is small.",
        "The lesion is small in relation to the image.",
        "A small lesion like this is easily missed.",
        "",
    ),
    "medium": ("It is of moderate size.", "It is neither large nor small.", ""),
    "large": (
        "It is large.",
        "The lesion is large and displaces its surroundings.",
        "A large part of the image is taken up.",
        "",
    ),
}
REASON = (
    "Unlike a vessel, it does not continue into the neighbouring tissue.",
    "An artefact would have straight edges and would cross organ borders, which this does not.",
    "Confounders such as normal folds are regular and paired, this is not.",
    "The other bright structures are symmetric on the {other} side of the image and therefore normal.",
    "A benign variant is less likely in a 58-year-old patient with a grade 2 lesion in 2019.",
    "A lymph node would have a fatty hilum.",
    "MRI would help to characterise it further, but the outline alone tells it from normal tissue.",
    "Compared with the normal tissue in the {other} half of the picture, its texture is coarse.",
    "The left lobe and the right lobe of the organ keep their proportions.",
    "The structures in the {other} part of the image are normal.",
    "Follow-up CT in 3 to 6 months would be the usual advice for it.",
    "Its growth of 2 mm over 12 months would fit stage T1b N0.",
    "Roughly 30 % of such findings are benign, but the notched border argues against that.",
    "It is distinguished from shadows, which lack a border of 1-2 mm.",
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
OPPOSITE = {"left": "right", "right": "left", "upper": "lower", "lower": "upper"}


def random_facts(rng: random.Random) -> Facts:
    modality = rng.choice(list(LESIONS))
    anatomy, lesions = LESIONS[modality]
    edge = {"small": 0.1, "medium": 0.2, "large": 0.4}[size := rng.choice(("small", "medium", "large"))]
    row, column = rng.choice(("upper", "", "lower")), rng.choice(("left", "", "right"))
    x = {"left": 0.02, "": 0.5 - edge / 2, "right": 0.98 - edge}[column]
    y = {"upper": 0.02, "": 0.5 - edge / 2, "lower": 0.98 - edge}[row]
    words = [word for word in (row, column) if word]
    place = " ".join(words) + " part" if words else "centre"
    count = rng.choice((1, 1, 1, 2, 3, 4))
    return Facts(rng.choice(lesions), anatomy, modality, count, size, place, (x, y, x + edge, y + edge))


def good_text(facts: Facts, rng: random.Random) -> str:
    article = "an" if facts.lesion[0] in "aeiou" else "a"
    number = NUMBERS[facts.count]
    words = {
        "lesion": facts.lesion,
        "place": facts.location,
        "article": article,
        "Article": article.capitalize(),
        "n": number,
        "N": number.capitalize(),
    }
    sides = [OPPOSITE[word] for word in facts.location.split() if word in OPPOSITE]
    parts = [
        *rng.sample(NORMAL[facts.modality], rng.randint(1, 2)),
        rng.choice(PLACE),
        *rng.sample(LOOK[facts.modality], rng.randint(1, 2)),
        rng.choice(COUNT_ONE if facts.count == 1 else COUNT_MANY),
        rng.choice(SIZE[facts.size]),
        *rng.sample([text for text in REASON if sides or "{other}" not in text], rng.randint(1, 2)),
    ]
    if rng.random() < 0.3:
        parts = [*parts[1:3], parts[0], *parts[3:]]
    return " ".join(part for part in parts if part).format(**words, other=rng.choice(sides or [""]))

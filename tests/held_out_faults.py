"""Faults in other wordings than those of `segrl.curation.planted`, written after the rules.

The rules as they first were caught 81 % of them (docs/log.md) and have been widened since: they are held out no more.
Sentences are added to good texts, or hold one in place of {text}. `{x}`, `{y}` and the like are numbers, `{wrong}` is a
side on which the lesion is not.
"""

COORDINATES = (
    "Starting at ({x}, {y}) its border runs diagonally.",
    "Bounds: [{x}, {y}] to [{x2}, {y2}].",
    "The detection <bbox>{x},{y},{x2},{y2}</bbox> corresponds to it.",
    "One finds it at horizontal offset {x} and vertical offset {y}.",
    "Its left boundary is at {x} px.",
    "It is {x} pixels away from the lower border.",
    "The hottest point is (x={x}, y={y}).",
    "In percent of the picture size its middle is {p}/{q}.",
    "Approximately {p}% in from the left-hand side, the tissue changes.",
    "A rectangle with corners {x},{y} and {x2},{y2} would contain it.",
    "Location: ({x};{y})-({x2};{y2}).",
    "Pixel range {x}–{x2} on the x-axis, {y}–{y2} on the y-axis.",
    "The lesion is centred {p} percent along the horizontal axis.",
    "(0.{p}, 0.{q}) in relative units is its centre.",
    "It can be framed by 〈{x}, {y}, {x2}, {y2}〉.",
)
CONTRADICTION_SIDE = (
    "The lesion is situated on the {wrong} of the image.",
    "It occupies the {wrong} portion of the picture.",
    "Near the {wrong} margin of the frame one finds the lesion.",
    "The abnormal area is in the {wrong}most third of the slice.",
)
CONTRADICTION_MODALITY = {
    "CT": "The lesion shows increased echogenicity on this ultrasound image.",
    "MRI": "This X-ray shows the lesion as a dense shadow.",
    "Ultrasound": "The lesion is hyperintense on this T2-weighted MR image.",
    "X-ray": "The endoscopic image depicts a raised lesion.",
    "Dermoscopy": "In this CT scan the lesion is hyperdense.",
    "Endoscopy": "The sonographic picture shows a hypoechoic lesion.",
    "Fundus photography": "In this dermoscopic image the pigment network is irregular.",
}
CONTRADICTION_MANY = (
    "There are five lesions in total.",
    "Six nodules are scattered here.",
    "The image contains four lesions.",
)
CONTRADICTION_LARGE = ("The lesion is enormous.", "This is a massive lesion.", "The mass is large and bulky.")
LANGUAGE = (
    "Die Läsion zeigt eine unscharfe Randbegrenzung gegenüber dem gesunden Gewebe.",
    "On observe une masse aux contours flous dans la partie supérieure.",
    "Se observa una masa de contornos mal definidos en la parte superior.",
    "Si osserva una massa dai contorni sfumati nella parte superiore.",
    "Förändringen har oskarpa kanter mot den omgivande vävnaden.",
    "Lze pozorovat útvar s neostrými okraji v horní části.",
    "图像上部可见一个边界不清的肿块。",
    "画像の上部に境界不明瞭な腫瘤が認められる。",
    "В верхней части изображения видно образование с нечёткими краями.",
    "Observa-se uma massa de contornos mal definidos na parte superior.",
)
FORMAT = (
    "<reasoning>{text}</reasoning>",
    "### Answer\n{text}",
    "* {text}",
    "{text} [SEG]",
    "1) {text}\n2) That is all.",
    "`{text}`",
    "Final answer: {text}",
    "{text} <|endoftext|>",
    "Reasoning:\n{text}",
    '"reasoning": "{text}"',
)
BOILERPLATE = (
    "I am not a doctor, so please take this with caution.",
    "For an accurate assessment, see a specialist.",
    "I'd be happy to describe further images.",
    "My apologies, I cannot process this request.",
    "This analysis was generated automatically and may contain errors.",
    "Hope this helps!",
    "The user wants to know where the lesion is.",
    "Let me look at the image carefully.",
)
LENGTH = ("Visible.", "There is something.", "The lesion, yes.", "")

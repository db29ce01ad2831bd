"use strict";
// Every text of a model or a file goes into textContent: none of it is ever markup.
const $ = (name) => document.getElementById(name);
let slices = [];
let links = [];
let running = null;

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").className = wrong ? "error" : "";
}

async function begin() {
  const info = await (await fetch("/api/info")).json();
  $("name").textContent = info.name;
  document.title = info.name ? `segrl: ${info.name}` : "segrl";
  $("kinds").textContent = `${info.files.join(" ")}, at most ${info.max_size_mb} MB`;
  $("file").accept = info.files.join(",");
  for (const count of [1, 2, 4, 8, 16].filter((n) => n <= info.max_samples)) $("samples").append(new Option(count, count));
  for (const example of info.examples) $("examples").append(await exampleButton(example, info.task));
}

async function exampleButton(example, task) {
  const response = await fetch(`/examples/${example.number}`);
  const name = /filename="([^"]+)"/.exec(response.headers.get("Content-Disposition"))[1];
  const content = await response.blob();
  const button = document.createElement("button");
  button.type = "button";
  button.title = example.question || name;
  if (task === "images") {
    const picture = document.createElement("img");
    picture.src = URL.createObjectURL(content);
    picture.alt = example.question || name;
    button.append(picture);
  } else button.textContent = name;
  button.addEventListener("click", () => {
    const chosen = new DataTransfer();
    chosen.items.add(new File([content], name));
    $("file").files = chosen.files;
    $("file").dispatchEvent(new Event("change"));
    if (example.question) $("question").value = example.question;
  });
  return button;
}

function preview() {
  const file = $("file").files[0];
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  const shown = file && /\.(png|jpe?g|bmp|webp)$/i.test(file.name);
  $("preview").hidden = !shown;
  if (shown) $("preview").src = URL.createObjectURL(file);
}

async function ask(event) {
  event.preventDefault();
  if (running) running.abort();
  running = new AbortController();
  $("ask").disabled = true;
  $("answer").hidden = true;
  say("Waiting for the answer ...");
  const began = performance.now();
  try {
    const form = new FormData($("form"));
    const response = await fetch("/api/predict?format=page", { method: "POST", body: form, signal: running.signal });
    const found = await response.json();
    if (!response.ok) throw new Error(found.error);
    show(found);
    say(`Answered in ${((performance.now() - began) / 1000).toFixed(1)} s.`);
  } catch (problem) {
    say(problem.message, true);
  } finally {
    $("ask").disabled = false;
  }
}

function show(found) {
  $("overlay").src = found.overlay;
  $("state").textContent = found.status;
  $("reasoning").textContent = found.reasoning ?? "none";
  $("text").textContent = found.answer ?? found.text;
  $("boxes").textContent = found.boxes.map((box) => `[${box.map((side) => Math.round(side * 10) / 10).join(", ")}]`).join("\n") || "none";
  const unit = found.slices.length ? "voxels" : "pixels";
  $("mask").textContent = found.mask_file ? `${found.mask_file.foreground} ${unit}` : "none";
  $("confidence").textContent = confidence(found.confidence);
  slices = found.slices;
  $("slices").hidden = !slices.length;
  if (slices.length) {
    $("slice").max = slices.length - 1;
    const named = slices.findIndex((slice) => slice.index === found.slice);
    $("slice").value = named < 0 ? Math.floor(slices.length / 2) : named;
    turn();
  }
  offer(found);
  $("answer").hidden = false;
}

function confidence(found) {
  if (!found) return "not asked: draw several answers";
  const percent = (value) => (value === null ? "none" : `${Math.round(100 * value)} %`);
  return `${percent(found.value)} (agreement of ${found.samples} answers ${percent(found.agreement)}, mean probability ${percent(found.probability)}, valid ${percent(found.valid)})`;
}

function turn() {
  const slice = slices[Number($("slice").value)];
  $("overlay").src = slice.picture;
  $("index").textContent = slice.index;
}

function offer(found) {
  links.forEach((link) => URL.revokeObjectURL(link));
  links = [];
  $("downloads").replaceChildren();
  const values = Object.fromEntries(Object.entries(found).filter(([key]) => !["overlay", "mask_file", "slices"].includes(key)));
  const stem = found.name.replace(/(\.nii)?\.[^.]+$/, "");
  if (found.mask_file) link("Mask", bytes(found.mask_file.data), found.mask_file.name);
  link("Picture", bytes(found.overlay), `${stem}_overlay.png`);
  link("Values", new Blob([JSON.stringify(values, null, 2)], { type: "application/json" }), `${stem}.json`);
}

function bytes(data) {
  const [head, text] = data.split(",");
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: /:(.*?);/.exec(head)[1] });
}

function link(text, content, name) {
  const made = document.createElement("a");
  made.href = URL.createObjectURL(content);
  links.push(made.href);
  made.download = name;
  made.textContent = text;
  $("downloads").append(made);
}

$("file").addEventListener("change", preview);
$("form").addEventListener("submit", ask);
$("slice").addEventListener("input", turn);
begin().catch((problem) => say(problem.message, true));

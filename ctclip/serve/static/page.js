// The page: send a scan, follow its progress, show its findings.
"use strict";

const $ = (id) => document.getElementById(id);
let scan = null;      // id of the scan on the page
let ofStore = false;  // whether it is a volume of the store, whose position in the scanner is not stored
let turn = 0;         // counts the chosen scans: late answers for an earlier one are dropped
let sending = null;   // the request that uploads a scan
let started = null;   // the viewer, created on first use
let caveats = [];     // warnings that the top of the page already shows
// The interval covers only the uncertainty of the calibration.
const INTERVAL = " Below each probability, and as a line on the scale, is its 95 % confidence interval, which depends on the number of patients used for calibration. It holds for patients like them.";
let mark = null;      // starting point for measuring with the keyboard, in mm
let mapped = null;    // the finding whose map lies over the scan

async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...(options.headers || {}), ...(token ? { authorization: `Bearer ${token}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) { await login(); return call(path, options); }
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).detail || `the service answered ${answer.status}`);
  return answer;
}

function login() {
  $("denied").textContent = sessionStorage.getItem("token") ? "The token was not accepted." : "";
  $("token").value = "";
  if (!$("login").open) $("login").showModal();
  return new Promise((done) => $("login").addEventListener("close", () => { sessionStorage.setItem("token", $("token").value); done(); }, { once: true }));
}

function sentenceOf(words, end = ".") {
  return `${words[0].toUpperCase()}${words.slice(1)}${end}`;
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function say(stage, share) {
  $("work").hidden = !stage;
  $("stage").textContent = stage || "";
  if (share === undefined) $("progress").removeAttribute("value"); else $("progress").value = share;
}

function refuse(error) {
  say("");
  $("reason").textContent = error.message || String(error);
  $("reason").hidden = false;
}

async function describeModel() {
  const facts = await (await call("/v1/models")).json();
  $("model").textContent = `${facts.name} · ${facts.encoder} · ${facts.labels.name} (${facts.labels.names.length} findings)`;
  caveats = facts.caveats;
  const sentences = caveats.map((caveat) => sentenceOf(caveat));
  const calibrated = facts.calibrated_on ? [`Its probabilities were calibrated on ${facts.calibrated_on}.`] : [];
  $("trained").textContent = [`The model was trained on: ${facts.trained_on.words} (supervision: ${facts.trained_on.supervision}).`, ...calibrated, ...sentences].join(" ");
  $("notice").textContent = [facts.notice, ...sentences].join(" ");
  $("neighbours").dataset.there = facts.index ? "yes" : "";
  offerDraft(facts.draft);
  $("stored").hidden = !facts.stored.length;
  $("pacs").hidden = !facts.dicomweb;
  // Thousands of options: created only when the field is used.
  $("volume").addEventListener("focus", () => $("volumes").replaceChildren(...facts.stored.slice(0, 5000).map((name) => element("option", undefined, { value: name }))), { once: true });
}

// fetch cannot report the progress of an upload.
function send(form) {
  return new Promise((done, failed) => {
    const request = sending = new XMLHttpRequest();
    request.open("POST", "/v1/scans");
    const token = sessionStorage.getItem("token");
    if (token) request.setRequestHeader("authorization", `Bearer ${token}`);
    request.upload.onprogress = (event) => say(`sending: ${Math.round(event.loaded / 1e6)} of ${Math.round(event.total / 1e6)} MB`, event.loaded / event.total);
    request.onload = () => {
      let answer = {};
      try { answer = JSON.parse(request.responseText); } catch { /* a proxy's page, say */ }
      if (request.status === 202) done(answer); else failed(new Error(answer.detail || `the service answered ${request.status}`));
    };
    request.onerror = () => failed(new Error("the upload failed: it may be too large, or the service has stopped"));
    request.onabort = () => failed(new Error("cancelled"));
    request.send(form);
  });
}

// ``seen`` is called when the scan can be viewed, before it is encoded.
async function follow(id, seen) {
  const reader = (await call(`/v1/scans/${id}/events`)).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the service has stopped");
    text += value;
    const lines = text.split("\n\n");
    text = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data: "))) {
      const facts = JSON.parse(line.slice(6));
      if (facts.stage === "done") return facts;
      if (facts.reason || facts.stage === "cancelled") throw new Error(facts.reason || "cancelled");
      if (facts.stage === "encoding") seen();
      say({ queued: "waiting for other scans", fetching: "fetching the series from the PACS", reading: "reading and checking the scan", encoding: "encoding" }[facts.stage] || facts.stage);
    }
  }
}

async function look(form) {
  forget();
  ofStore = form.has("volume");
  const mine = turn;
  say("sending", 0);
  try {
    const { scan: id } = await send(form);
    if (mine !== turn) return call(`/v1/scans/${id}`, { method: "DELETE" }).catch(() => {});
    scan = id;
    let drawn = null;
    // An error is reported by the code that waits for the drawing.
    const draw = () => { drawn ??= showScan(id); drawn.catch(() => {}); };
    const facts = await follow(id, draw);
    if (mine !== turn) return;
    show(facts);
    draw();
    say("drawing the scan");
    await drawn;
    if (mine === turn) say("");
  } catch (error) { if (mine === turn) refuse(error); }
}

// Remove the scan from the page and the service, and abort an upload in progress.
function forget() {
  turn++;
  if (sending) sending.abort();
  if (scan) call(`/v1/scans/${scan}`, { method: "DELETE", keepalive: true }).catch(() => {});
  scan = sending = null;
  say("");
  $("reason").hidden = $("results").hidden = $("viewer").hidden = true;
  $("warnings").replaceChildren();
}

function show(facts) {
  $("results").hidden = false;
  document.querySelector("[data-save='dicom.zip']").hidden = !facts.dicom;
  $("deposit").hidden = !facts.dicom || $("pacs").hidden;
  $("deposited").textContent = "";
  $("warnings").replaceChildren(...facts.warnings.filter((text) => !caveats.includes(text)).map((text) => element("li", sentenceOf(text, ""))));
  $("calibrated").textContent = facts.findings.some((finding) => finding.threshold !== null)
    ? `Findings are ordered by their distance from the decision threshold (the mark on the scale); those at or above it are bold.${facts.findings.some((finding) => finding.interval) ? INTERVAL : ""}`
    : "The model is not calibrated: there are no thresholds, and the probabilities of different findings cannot be compared.";
  const rows = [];
  facts.findings.forEach((finding, number) => {
    if (number && finding.threshold === null && facts.findings[number - 1].threshold !== null) {
      const apart = element("tr", undefined, { class: "apart" });
      apart.append(element("td", "not calibrated: not comparable with the findings above", { colspan: 3 }));
      rows.push(apart);
    }
    rows.push(row(finding));
  });
  document.querySelector("#findings tbody").replaceChildren(...rows);
  document.querySelector("#asked tbody").replaceChildren();
  clearDraft();
  neighbours();
}

function row(finding) {
  const line = element("tr"), first = element("td", undefined, finding.above ? { class: "above" } : {});
  const name = element("button", finding.name, { type: "button", class: "name", title: "Show where" });
  name.onclick = () => where(finding.name, name);
  const scale = element("div", undefined, { class: "scale", "aria-hidden": "true" }), bar = element("i");
  bar.style.width = `${100 * finding.probability}%`;
  scale.append(bar);
  if (finding.interval) { const spread = element("u"); spread.style.left = `${100 * finding.interval[0]}%`; spread.style.right = `${100 - 100 * finding.interval[1]}%`; scale.append(spread); }
  if (finding.threshold !== null) { const mark = element("b"); mark.style.left = `${100 * finding.threshold}%`; scale.append(mark); }
  first.append(name, scale);
  for (const [what, value] of Object.entries(finding.values || {})) first.append(element("div", `${what}: ${value.toFixed(1)} if present`, { class: "note" }));
  const percent = (share) => (100 * share).toFixed(1), probability = element("td", `${percent(finding.probability)} %`);
  if (finding.interval) probability.append(element("div", `${finding.interval.map(percent).join(" to ")} %`, { class: "note" }));
  line.append(first, probability, element("td", finding.threshold === null ? "none" : `${percent(finding.threshold)} %`));
  return line;
}

async function showScan(id) {
  const buffer = await (await call(`/v1/scans/${id}/view.nii.gz`)).arrayBuffer();
  if (id !== scan) return;
  $("viewer").hidden = false;
  started ??= viewer.start($("canvas"), place, (distance) => { $("distance").textContent = `${distance.toFixed(1)} mm measured.`; });
  try { await started; } catch (error) { started = null; throw error; }
  mark = null;
  $("distance").textContent = "";
  $("clear").click();
  await viewer.show(buffer, ...limits());
}

function place({ mm, hu }) {
  // RAS: towards the right, the front, the head.
  const sides = [["R", "L"], ["A", "P"], ["S", "I"]];
  const words = mm.map((value, axis) => `${sides[axis][value < 0 ? 1 : 0]} ${Math.abs(value).toFixed(1)}`);
  if (mark) $("distance").textContent = `${Math.hypot(...mm.map((value, axis) => value - mark[axis])).toFixed(1)} mm from the mark; x removes it.`;
  $("place").textContent = `${hu === undefined ? "" : `${Math.round(hu)} HU at `}${words.join(", ")} mm${ofStore ? " from the middle of the stored grid" : ""}`;
}

const limits = () => $("window").value.split(",").map(Number);
const setWindow = () => viewer.range(...limits());

async function where(name, button) {
  const asked = scan;
  try {
    button.disabled = true;
    const facts = await (await call(`/v1/scans/${asked}/explain?finding=${encodeURIComponent(name)}`)).json();
    const map = await (await call(`/v1/scans/${asked}/map.nii.gz?finding=${encodeURIComponent(name)}`)).arrayBuffer();
    if (asked !== scan) return null;
    await viewer.overlay(map, facts.level, facts.height);
    viewer.to(facts.peak_mm_ras);
    const across = [facts.size_mm_right_left, facts.size_mm_front_back, facts.size_mm_foot_head].map((mm) => mm.toFixed(0)).join(" × ");
    $("mapped").textContent = `${facts.finding}: ${facts.side ? `${facts.side}, ` : ""}region of ${across} mm around the peak. A map shows what influenced the score, which need not be the finding.`;
    cover(name);
    $("canvas").focus();
    $("frame").scrollIntoView({ block: "nearest" });
    return facts;
  } catch (error) { if (asked === scan) refuse(error); return null; } finally { button.disabled = false; }
}

function cover(name) {
  mapped = name;
  $("clear").hidden = document.querySelector("[data-save='map.nii.gz']").hidden = !name;
}

async function neighbours() {
  $("neighbours").hidden = !$("neighbours").dataset.there;
  if ($("neighbours").hidden) return;
  const asked = scan;
  const found = await call(`/v1/scans/${asked}/similar`).then((answer) => answer.json()).catch(() => null);
  if (asked !== scan) return;
  for (const kind of ["scans", "reports"]) {
    $(kind).replaceChildren(...(found ? found[kind] : []).map((hit) => {
      const line = element("li"), more = element("details");
      more.append(element("summary", `${hit.volume} (similarity ${hit.similarity.toFixed(2)}${hit.same_patient ? ", of this patient" : ""})`), element("p", hit.findings), element("p", hit.impression));
      line.append(more);
      return line;
    }));
  }
}

// The page, the map and DICOM objects contain the finding on screen; the table contains all findings.
async function save(name) {
  const asked = mapped && name !== "findings.csv" && name !== "view.nii.gz" ? `?finding=${encodeURIComponent(mapped)}` : "";
  const url = URL.createObjectURL(await (await call(`/v1/scans/${scan}/${name}${asked}`)).blob());
  element("a", undefined, { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

// Files below a dropped folder.
async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const reader = entry.createReader(), files = [];
  for (;;) {
    const part = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!part.length) return files;
    for (const one of part) files.push(...await filesOf(one));
  }
}

function formOf(files) {
  const form = new FormData();
  for (const file of files) form.append("scan", file, file.name);
  return form;
}

for (const id of ["files", "folder"]) {
  // Clear the field, so that the same file can be chosen again.
  $(id).onchange = () => { if ($(id).files.length) { look(formOf($(id).files)); $(id).value = ""; } };
}
$("volume").onchange = () => { if (!$("volume").value) return; const form = new FormData(); form.append("volume", $("volume").value); look(form); };
$("pacs").onsubmit = async (event) => {
  event.preventDefault();
  $("reason").hidden = true;
  try {
    const study = $("study").value, list = await (await call(`/v1/dicomweb/series?study=${encodeURIComponent(study)}`)).json();
    if (!list.length) throw new Error("the PACS has no CT series of this study");
    $("series").replaceChildren(...list.map((one) => {
      const words = [one.number, one.description, one.images && `${one.images} images`].filter(Boolean).join(" · ");
      const button = element("button", words || one.series, { type: "button" });
      button.onclick = () => { const form = new FormData(); form.append("study", study); form.append("series", one.series); look(form); };
      return button;
    }));
  } catch (error) { refuse(error); }
};
$("deposit").onclick = async () => {
  $("deposit").disabled = true;
  try {
    const asked = mapped ? `?finding=${encodeURIComponent(mapped)}` : "";
    const { stored } = await (await call(`/v1/scans/${scan}/dicomweb${asked}`, { method: "POST" })).json();
    $("deposited").textContent = `${stored} objects were stored in the PACS.`;
  } catch (error) { refuse(error); } finally { $("deposit").disabled = false; }
};
$("drop").ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = async (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  // Items from other programs, such as mail attachments, are not entries.
  const plain = [...event.dataTransfer.files];
  say("reading the folder");
  try {
    const files = entries.length ? (await Promise.all(entries.map(filesOf))).flat() : plain;
    if (!files.length) throw new Error("no file was dropped");
    look(formOf(files));
  } catch (error) { refuse(error); }
};
$("cancel").onclick = forget;
// A closed page removes its scan; a page that may return keeps it.
window.addEventListener("pagehide", (event) => { if (!event.persisted) forget(); });
$("window").onchange = setWindow;
$("ruler").onclick = () => { const on = $("ruler").getAttribute("aria-pressed") !== "true"; $("ruler").setAttribute("aria-pressed", on); viewer.ruler(on); if (!on) $("distance").textContent = ""; };
$("clear").onclick = () => { viewer.overlay(null); cover(null); $("mapped").textContent = ""; };
$("remove").onclick = forget;
for (const button of document.querySelectorAll("[data-save]")) {
  button.onclick = async () => { button.disabled = true; await save(button.dataset.save).catch(refuse); button.disabled = false; };
}
for (const button of document.querySelectorAll("[data-plane]")) {
  button.onclick = () => {
    for (const other of document.querySelectorAll("[data-plane]")) other.setAttribute("aria-pressed", other === button);
    // The rendering shows bones.
    if (button.dataset.plane === "render") { $("window").value = "-450,1050"; setWindow(); }
    viewer.view(button.dataset.plane);
  };
}
$("ask").onsubmit = async (event) => {
  event.preventDefault();
  const asked = scan;
  try {
    const finding = await (await call(`/v1/scans/${asked}/text`, {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ text: $("text").value }),
    })).json();
    if (asked === scan) document.querySelector("#asked tbody").prepend(row(finding));
  } catch (error) { refuse(error); }
};
$("canvas").onkeydown = (event) => {
  const moves = { ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1] };
  if (event.key === "x") { mark = mark ? null : viewer.at(); $("distance").textContent = mark ? "Mark set: move to measure from it; x removes it." : ""; }
  if (moves[event.key]) { event.preventDefault(); viewer.step(...moves[event.key]); }
};
document.onkeydown = (event) => {
  if ($("viewer").hidden || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  const plane = { a: "axial", c: "coronal", s: "sagittal", m: "all", r: "render" }[event.key];
  if (plane) document.querySelector(`[data-plane=${plane}]`).click();
  if ("1234".includes(event.key)) { $("window").selectedIndex = Number(event.key) - 1; setWindow(); }
};
describeModel().catch(refuse);
// After the first frame has been drawn.
requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(() => viewer.load().catch(() => {}), 100)));

// The draft of a report: sentences, their claims, the detector's probability of each claim, and its location.
"use strict";

const METHODS = {
  caption: "Written by the model's caption head.",
  retrieval: "Copied from the report of the most similar scan of the index: it describes that scan.",
};

function offerDraft(method) {
  $("drafting").hidden = !method;
  $("drafting").dataset.method = method || "";
}

function clearDraft() {
  $("sentences").replaceChildren();
  $("drafted").textContent = METHODS[$("drafting").dataset.method] || "";
  $("draft").hidden = false;
}

$("draft").onclick = async () => {
  const asked = scan;
  $("draft").disabled = true;
  $("drafted").textContent = "writing …";
  try {
    const draft = await (await call(`/v1/scans/${asked}/draft`)).json();
    if (asked === scan) showDraft(draft);
  } catch (error) { if (asked === scan) { clearDraft(); refuse(error); } } finally { $("draft").disabled = false; }
};

function showDraft(draft) {
  const from = draft.copied_from && ` (${draft.copied_from.volume}, similarity ${draft.copied_from.similarity.toFixed(2)})`;
  const threshold = draft.calibrated ? "" : " The detector is not calibrated, so findings are called at 50 %.";
  $("drafted").textContent = `${METHODS[draft.method].replace(":", `${from || ""}:`)} ${sentenceOf(draft.note)}${threshold}`;
  $("draft").hidden = true;
  const parts = [];
  for (const section of ["findings", "impression"]) {
    if (draft[section].length) parts.push(element("h3", sentenceOf(section, "")), list(draft[section]));
  }
  $("sentences").replaceChildren(...(parts.length ? parts : [element("p", "Nothing was written.")]));
}

function list(sentences) {
  const lines = element("ul", undefined, { class: "sentences" });
  for (const sentence of sentences) {
    const line = element("li", sentence.text, sentence.denied ? { class: "denied" } : {});
    const claims = sentence.claims.length ? sentence.claims.map((claim) => claimOf(claim)) : [element("span", "not checked", { class: "claim", title: "It states no finding that the model knows." })];
    line.append(" ", ...claims);
    lines.append(line);
  }
  return lines;
}

// For a denied claim, show the probability of the finding, as in the table, because the threshold need not be 50 %.
function denial(claim, percent) {
  const absent = claim.status === "absent", share = percent(absent ? 1 - claim.probability : claim.probability);
  return `Denied: the detector calls ${claim.finding} ${absent ? "present" : "absent"} (${share}, ${absent ? "at or above" : "below"} its threshold)`;
}

function claimOf(claim) {
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const text = claim.probability === null ? `${claim.finding}: not scored` : claim.denied ? denial(claim, percent) : `${claim.finding} ${claim.status} ${percent(claim.probability)}`;
  if (claim.probability === null || claim.status !== "present") return element("span", text, { class: "claim" });
  const button = element("button", text, { type: "button", class: "claim", title: "Show where" });
  button.onclick = async () => {
    const place = await where(claim.finding, button);
    if (place && [claim.side, place.side].sort().join() === "left,right") $("mapped").textContent += ` The sentence says ${claim.side}, but the peak is on the ${place.side}.`;
  };
  return button;
}

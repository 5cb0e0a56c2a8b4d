// The legend below the timelines: what the boxes are, and where idle time goes, measured and simulated.
import { make, need, say } from "./dom";
import { finePercent } from "./format";
import { hatching, palette } from "./palette";
import type { Gap, Step } from "./protocol";
import { CAUSES, CAUSE_WORDS } from "./words";

const KINDS = [
  ["forward", "F", "forward", "the model makes its guess"],
  ["backward", "B", "backward", "finds out what to change, last layer first"],
  ["backward, input", "I", "backward, first half", "what the device before waits for"],
  ["backward, weights", "W", "backward, second half", "what nobody waits for"],
  ["optimizer", "U", "update", "makes the changes: this is learning"],
] as const;

const swatches = new Map<Gap["cause"], HTMLCanvasElement>();
const cells = new Map<Gap["cause"], { row: HTMLElement; measured: HTMLElement; simulated: HTMLElement }>();
const kinds = new Map<string, HTMLElement>();

export function makeLegend(): void {
  for (const [kind, letter, name, about] of KINDS) {
    const item = make(
      "li",
      {},
      make("span", { class: `box box-${letter.toLowerCase()}`, "aria-hidden": "true" }, letter),
      make("span", {}, make("b", {}, name), make("small", {}, about)),
    );
    kinds.set(kind, item);
    need("kinds").append(item);
  }
  need("kinds").append(
    arrow(false, "sent on", "results go to the next device"),
    arrow(true, "sent back", "what to change goes to the device before"),
  );
  for (const cause of CAUSES) {
    const swatch = make("canvas", { class: "swatch", "aria-hidden": "true" });
    const measured = make("td", {}, "–");
    const simulated = make("td", {}, "–");
    const { name, about } = CAUSE_WORDS[cause];
    const row = make(
      "tr",
      {},
      make("th", { scope: "row" }, swatch, make("span", {}, make("b", {}, name), make("small", {}, about))),
      measured,
      simulated,
    );
    swatches.set(cause, swatch);
    cells.set(cause, { row, measured, simulated });
    need("causes").append(row);
  }
  paintLegend();
}

function arrow(back: boolean, name: string, about: string): HTMLElement {
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.setAttribute("class", back ? "arrow back" : "arrow");
  picture.setAttribute("viewBox", "0 0 34 30");
  picture.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", back ? "M17 27V4m-5 6 5-6 5 6" : "M17 3v23m-5-6 5 6 5-6");
  picture.append(path);
  return make("li", {}, picture, make("span", {}, make("b", {}, name), make("small", {}, about)));
}

/** Draws the hatchings in the colours in force. */
export function paintLegend(): void {
  const { hatch, lane } = palette();
  const ratio = Math.min(3, devicePixelRatio || 1);
  for (const [cause, swatch] of swatches) {
    swatch.width = 26 * ratio;
    swatch.height = 18 * ratio;
    const context = swatch.getContext("2d");
    if (context === null) continue;
    context.scale(ratio, ratio);
    context.fillStyle = lane;
    context.fillRect(0, 0, 26, 18);
    context.fillStyle = hatching(context, cause, hatch, ratio);
    context.fillRect(0, 0, 26, 18);
  }
}

/** The part of all devices' time that goes to each cause. */
function shares(step: Step): Map<Gap["cause"], number> {
  const all = step.seconds * step.busy.length;
  const sums = new Map<Gap["cause"], number>();
  for (const { cause, start, end } of step.gaps) sums.set(cause, (sums.get(cause) ?? 0) + (end - start) / all);
  return sums;
}

export function drawLegend(measured: Step | null, simulated: Step | null): void {
  const [m, s] = [measured && shares(measured), simulated && shares(simulated)];
  for (const [cause, { row, measured: left, simulated: right }] of cells) {
    say(left, m === null ? "–" : finePercent(m.get(cause) ?? 0));
    say(right, s === null ? "–" : finePercent(s.get(cause) ?? 0));
    row.classList.toggle("none", (m?.get(cause) ?? 0) + (s?.get(cause) ?? 0) < 5e-4);
  }
  const used = new Set((measured ?? simulated)?.spans.map((span) => span.kind));
  for (const [kind, item] of kinds) item.classList.toggle("none", used.size > 0 && !used.has(kind as never));
}

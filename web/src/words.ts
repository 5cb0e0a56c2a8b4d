// Sentences about what devices do. Numbers in words begin with FIRST; those of the engine begin with 0.
import type { Gap, Run, Span, Step } from "./protocol";
import { duration } from "./format";

export const FIRST = 1;

let indices: number[] = [];

/** A device keeps its number when the planner gives it another place in the pipeline. */
export function numberDevices(run: Run): void {
  indices = run.devices.map((one) => one.index);
}

export const deviceNumber = (rank: number) => (indices[rank] ?? rank) + FIRST;
export const device = (rank: number) => `Device ${deviceNumber(rank)}`;
export const inside = (rank: number) => `device ${deviceNumber(rank)}`;

/** What was said elsewhere, as a sentence. */
export function sentence(words: string): string {
  const begun = words.charAt(0).toUpperCase() + words.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}

/** One, two or several things with commas and an "and". */
export function list(words: string[]): string {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words[words.length - 1]}`;
}

export const count = (n: number, one: string, several = `${one}s`) => `${n} ${n === 1 ? one : several}`;

/** The letter on a box. */
export function letter(span: Span): string {
  const letters: Record<Span["kind"], string> = {
    forward: "F",
    backward: "B",
    "backward, input": "I",
    "backward, weights": "W",
    optimizer: "U",
    copy: "C",
    host: "H",
  };
  return letters[span.kind];
}

export const boxLabel = (span: Span) => letter(span) + (span.microbatch < 0 ? "" : span.microbatch + FIRST);

/** What the engine's labels of the work at the end of a step stand for. */
function update(label: string): string {
  if (/^(clear|C$)/.test(label)) return "sets the sums of its changes back to zero";
  if (/^(norm|N$)/.test(label)) return "measures how large the changes to its weights are";
  if (/^(step|update|U$)/.test(label)) return "changes its weights: this is what is learned in the step";
  if (/R$/.test(label)) return "sends its changes to the device that adds them up";
  if (/A$/.test(label)) return "adds the changes that others sent to its own";
  if (/G$/.test(label)) return "receives weights that another device has changed";
  return "does its share of changing the weights";
}

function deed(span: Span): string {
  const which = `microbatch ${span.microbatch + FIRST}, stage ${span.stage + FIRST}`;
  switch (span.kind) {
    case "forward":
      return `computes the forward pass of ${which}`;
    case "backward":
      return `computes the backward pass of ${which}`;
    case "backward, input":
      return `computes the half of the backward pass that others wait for, of ${which}`;
    case "backward, weights":
      return `computes the half of the backward pass that nobody waits for, of ${which}`;
    case "copy":
      return `moves data of ${which}`;
    case "host":
      return "is handed its work by the browser";
    case "optimizer":
      return update(span.label);
  }
}

const CLOSE = 1e-7;

/** How long the device had nothing to do just before this action, and for whom it waited. */
export function waited(span: Span, step: Step): { seconds: number; peer: number } {
  const before = step.spans
    .filter(
      (other) =>
        other.rank === span.rank && other.track === "compute" && other.end <= span.start + CLOSE && other !== span,
    )
    .reduce((latest, other) => Math.max(latest, other.end), 0);
  const gaps = step.gaps.filter(
    (gap) => gap.rank === span.rank && gap.start >= before - CLOSE && gap.end <= span.start + CLOSE,
  );
  const longest = gaps.reduce<Gap | null>((a, b) => (a === null || b.end - b.start > a.end - a.start ? b : a), null);
  return { seconds: gaps.reduce((sum, gap) => sum + gap.end - gap.start, 0), peer: longest?.peer ?? -1 };
}

export function actionSentence(span: Span, step: Step): string {
  const { seconds, peer } = waited(span, step);
  const took = `, in ${duration(span.end - span.start)}.`;
  if (seconds < 1e-6) return `${device(span.rank)} ${deed(span)}${took}`;
  return `${device(span.rank)} ${deed(span)}${took} It waited ${duration(seconds)}${peer < 0 ? "" : ` for ${inside(peer)}`}.`;
}

export const CAUSES: Gap["cause"][] = ["warm-up", "drain", "imbalance", "link", "host"];

/** What each cause of idle time is called here, and what it means. */
export const CAUSE_WORDS: Record<Gap["cause"], { name: string; about: string }> = {
  "warm-up": { name: "filling", about: "the first microbatch is still on its way through the devices before it" },
  drain: { name: "emptying", about: "its part is done, and others still work" },
  imbalance: { name: "waiting for another", about: "what it needs next has not been computed yet" },
  link: { name: "on the way", about: "what it needs next has been computed and is being sent" },
  host: { name: "browser", about: "everything is there, but the browser has not handed over the work yet" },
};

export function gapSentence(gap: Gap): string {
  const { name, about } = CAUSE_WORDS[gap.cause];
  const peer = gap.peer < 0 ? "" : ` It waits for ${inside(gap.peer)}.`;
  return `${device(gap.rank)} has nothing to do for ${duration(gap.end - gap.start)} (${name}): ${about}.${peer}`;
}

/** What every device does at a moment, for a replay. */
export function moment(step: Step, time: number): string {
  const devices = step.busy.map((_, rank) => {
    const span = step.spans.find((s) => s.rank === rank && s.track === "compute" && s.start <= time && time < s.end);
    return `${device(rank)}: ${span === undefined ? "waits" : boxLabel(span)}`;
  });
  return `${duration(time)} into the step. ${devices.join(", ")}.`;
}

/** The layers from one index to another, in words. */
export function layersInWords(run: Run, first: number, end: number): string {
  const parts: string[] = [];
  const layers = run.layers.slice(first, end);
  const blocks = blockNumbers(run);
  for (let i = 0; i < layers.length; i++) {
    const layer = layers[i];
    const block = blocks[first + i];
    if (layer.kind === "embedding" || layer.kind === "head") parts.push(layer.kind);
    else if (layer.kind === "attention" && layers[i + 1]?.kind === "mlp") {
      parts.push(`block ${block}`);
      i++;
    } else parts.push(`${layer.kind === "mlp" ? "MLP" : "attention"} of block ${block}`);
  }
  return list(joinRanges(parts));
}

/** "block 2", "block 3", "block 4" become "blocks 2 to 4". */
function joinRanges(parts: string[]): string[] {
  const joined: string[] = [];
  for (let i = 0; i < parts.length;) {
    let end = i;
    while (/^block /.test(parts[i]) && /^block /.test(parts[end + 1] ?? "")) end++;
    if (end - i < 1) joined.push(parts[i]);
    else joined.push(`blocks ${parts[i].slice(6)} to ${parts[end].slice(6)}`);
    i = end + 1;
  }
  return joined;
}

/** Of each layer, the number of its block in words; embedding and head have none (0). */
export function blockNumbers(run: Run): number[] {
  let block = FIRST - 1;
  return run.layers.map((layer, i) => {
    if (layer.kind === "embedding" || layer.kind === "head") return 0;
    const second = layer.kind === "mlp" && run.layers[i - 1]?.kind === "attention";
    if (!second) block++;
    return block;
  });
}

/** What a run does in another way than the one before it, with the same weights; empty if nothing that matters to it. */
export function planChange(before: Run, after: Run): string {
  const [was, is] = [before.settings, after.settings];
  const changes: string[] = [];
  if (is.devices !== was.devices) changes.push(count(is.devices, "device"));
  if (is.replicas !== was.replicas)
    changes.push(is.replicas === 1 ? "one pipeline" : `${is.replicas} pipelines beside each other`);
  if (is.schedule !== was.schedule) changes.push(is.schedule);
  if (is.microbatches !== was.microbatches) changes.push(count(is.microbatches, "microbatch", "microbatches"));
  if (changes.length === 0 && String(is.cuts) !== String(was.cuts)) changes.push("another cut");
  return list(changes);
}

/** How far two losses agree. */
export function agreement(digits: number): string {
  if (digits >= 17) return "bit for bit";
  if (digits <= 0) return "to no digit";
  return `to ${count(digits, "digit")}`;
}

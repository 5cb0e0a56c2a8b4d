// What passes from one device to another in a step: the results of forward passes down the pipeline, gradients back up.
import type { Span, Step } from "./protocol";

export interface Transfer {
  from: number;
  to: number;
  leave: number; // when the sender has computed it
  arrive: number;
  forward: boolean;
  microbatch: number;
}

const COPY = /^(\d+)(RECV|SEND)_([FB])(\d+)$/;

/** Pairs every action with the one on another device whose result it needs. */
export function transfers(step: Step): Transfer[] {
  const forward = new Map<string, Span>();
  const backward = new Map<string, Span>();
  const copied = new Map<string, number>();
  for (const span of step.spans) {
    const key = `${span.stage} ${span.microbatch}`;
    if (span.track === "copy") {
      const copy = COPY.exec(span.label);
      if (copy === null) continue;
      const down = copy[3] === "F";
      const stage = Number(copy[1]) + (copy[2] === "RECV" ? 0 : down ? 1 : -1);
      const name = `${copy[3]} ${stage} ${copy[4]}`;
      copied.set(name, Math.max(span.end, copied.get(name) ?? 0));
    } else if (span.track === "compute") {
      if (span.kind === "forward") forward.set(key, span);
      else if (span.kind === "backward" || span.kind === "backward, input") backward.set(key, span);
    }
  }
  const found: Transfer[] = [];
  const pair = (spans: Map<string, Span>, side: 1 | -1, letter: string) => {
    for (const to of spans.values()) {
      const from = spans.get(`${to.stage - side} ${to.microbatch}`);
      if (from === undefined || from.rank === to.rank) continue;
      const end = copied.get(`${letter} ${to.stage} ${to.microbatch}`) ?? to.start;
      const arrive = Math.max(from.end, Math.min(end, to.start));
      found.push({
        from: from.rank,
        to: to.rank,
        leave: from.end,
        arrive,
        forward: side === 1,
        microbatch: to.microbatch,
      });
    }
  };
  pair(forward, 1, "F");
  pair(backward, -1, "B");
  return found;
}

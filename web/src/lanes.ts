// Draws one step onto a canvas: a lane for each device, boxes for what it computes, hatching where it has nothing to do,
// lines between lanes for what passes between devices.
import { duration, percent } from "./format";
import { hatching, type Palette } from "./palette";
import type { Gap, Span, Step } from "./protocol";
import { transfers, type Transfer } from "./transfers";
import { boxLabel, CAUSES, device, deviceNumber } from "./words";

export type Hit = { span: Span } | { gap: Gap };

export interface View {
  step: Step | null;
  devices: number;
  scale: number; // seconds over the whole width
  cursor: number | null; // what starts later is faint
  chosen: Hit | null;
  words: string; // in the place of a step, where there is none
}

const AXIS = 26;
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";

export class Lanes {
  private readonly context: CanvasRenderingContext2D;
  private palette!: Palette;
  private hatches = new Map<Gap["cause"], CanvasPattern | string>();
  private width = 0;
  private ratio = 1;
  private view: View | null = null;
  private lines: { of: Step | null; all: Transfer[] } = { of: null, all: [] };

  constructor(
    readonly canvas: HTMLCanvasElement,
    private readonly axis: boolean,
  ) {
    const context = canvas.getContext("2d");
    if (context === null) throw new Error("This browser cannot draw on a canvas.");
    this.context = context;
  }

  /** Takes new colours. */
  paint(colours: Palette): void {
    this.palette = colours;
    this.hatches = new Map(CAUSES.map((cause) => [cause, hatching(this.context, cause, colours.hatch, this.ratio)]));
  }

  /** Makes the canvas as wide as its place and as high as so many lanes need. */
  fit(width: number, devices: number, colours: Palette): void {
    this.width = width;
    const height = this.height(devices);
    this.ratio = Math.min(3, devicePixelRatio || 1);
    const [w, h] = [Math.round(width * this.ratio), Math.round(height * this.ratio)];
    if (this.canvas.width !== w || this.canvas.height !== h) {
      this.canvas.width = w;
      this.canvas.height = h;
      this.canvas.style.height = `${height}px`;
    }
    this.paint(colours);
  }

  private get small() {
    return this.width < 620;
  }
  private get gutter() {
    return this.small ? 30 : 92;
  }
  private get lane() {
    return this.small ? 32 : 42;
  }
  private get between() {
    return this.small ? 14 : 20;
  }
  private height(devices: number) {
    return 4 + devices * (this.lane + this.between) - this.between + (this.axis ? AXIS : 4);
  }
  private top(rank: number) {
    return 4 + rank * (this.lane + this.between);
  }
  private x(time: number) {
    const scale = this.view?.scale || 1;
    return this.gutter + (time / scale) * (this.width - this.gutter - 2);
  }

  draw(view: View): void {
    this.view = view;
    if (this.width <= this.gutter + 2) return; // there is no place yet
    const { context: c, palette: p, ratio } = this;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, this.canvas.width / ratio, this.canvas.height / ratio);
    this.drawGrid(view);
    for (let rank = 0; rank < view.devices; rank++) this.drawLane(rank, view.step);
    if (view.step === null) {
      c.fillStyle = p.soft;
      c.font = `400 ${this.small ? 13 : 15}px ${FONT}`;
      c.textAlign = "center";
      c.textBaseline = "middle";
      const middle = 4 + (view.devices * (this.lane + this.between) - this.between) / 2;
      // On a plate of its own where it would cross the edges of lanes.
      const wide = c.measureText(view.words).width + 28;
      const x = (this.gutter + this.width) / 2;
      c.fillStyle = p.surface;
      this.box(x - wide / 2, middle - 16, wide, 32, 16);
      c.fill();
      c.fillStyle = p.soft;
      c.fillText(view.words, x, middle + 1);
      return;
    }
    for (const gap of view.step.gaps) this.drawGap(gap);
    this.drawTransfers(view.step, view.cursor);
    for (const span of view.step.spans) if (span.track === "compute") this.drawSpan(span, view);
    if (view.chosen !== null) this.drawChosen(view.chosen);
    if (view.cursor !== null) this.drawCursor(view.cursor, view.devices);
  }

  private box(x: number, y: number, w: number, h: number, r: number): void {
    this.context.beginPath();
    this.context.roundRect(x, y, w, h, Math.min(r, w / 2));
  }

  private drawGrid({ scale, devices }: View): void {
    const { context: c, palette: p } = this;
    const bottom = this.top(devices - 1) + this.lane;
    c.font = `400 11px ${FONT}`;
    c.textBaseline = "alphabetic";
    for (const tick of ticks(scale, this.small ? 3 : 7)) {
      const x = Math.round(this.x(tick)) + 0.5;
      c.strokeStyle = p.line;
      c.lineWidth = 1;
      c.beginPath();
      c.moveTo(x, 0);
      c.lineTo(x, bottom + 4);
      c.stroke();
      if (!this.axis) continue;
      c.fillStyle = p.soft;
      c.textAlign = tick === 0 ? "left" : "center";
      c.fillText(tick === 0 ? "0" : axisLabel(tick), x, bottom + 19);
    }
  }

  private drawLane(rank: number, step: Step | null): void {
    const { context: c, palette: p } = this;
    const y = this.top(rank);
    c.fillStyle = p.ink;
    c.textAlign = "left";
    c.textBaseline = "middle";
    c.font = `600 13px ${FONT}`;
    if (this.small) c.fillText(`D${deviceNumber(rank)}`, 0, y + this.lane / 2);
    else {
      const busy = step?.busy[rank];
      c.fillText(device(rank), 0, y + this.lane / 2 - (busy === undefined ? 0 : 8));
      if (busy !== undefined) {
        c.font = `400 12px ${FONT}`;
        c.fillStyle = p.soft;
        c.fillText(`${percent(busy)} busy`, 0, y + this.lane / 2 + 9);
      }
    }
    c.fillStyle = p.lane;
    // As long as the step, so that what is not hatched and has no box is seen to be after its end.
    const end = step === null ? this.width - 2 : this.x(step.seconds);
    this.box(this.gutter, y, end - this.gutter, this.lane, 3);
    c.fill();
  }

  private drawGap(gap: Gap): void {
    const x = this.x(gap.start);
    const w = this.x(gap.end) - x;
    if (w < 0.5) return;
    this.context.fillStyle = this.hatches.get(gap.cause) ?? this.palette.hatch;
    this.context.fillRect(x, this.top(gap.rank), w, this.lane);
  }

  private drawTransfers(step: Step, cursor: number | null): void {
    if (this.lines.of !== step) this.lines = { of: step, all: transfers(step) };
    const { context: c, palette: p } = this;
    c.lineWidth = 1.25;
    for (const { from, to, leave, arrive, forward } of this.lines.all) {
      const down = to > from;
      const [x0, x1] = [this.x(leave), this.x(arrive)];
      const y0 = this.top(from) + (down ? this.lane : 0);
      const y1 = this.top(to) + (down ? 0 : this.lane);
      const bend = (y1 - y0) / 2;
      c.globalAlpha = cursor !== null && leave > cursor ? 0.12 : 0.85;
      c.strokeStyle = c.fillStyle = p.kinds[forward ? "forward" : "backward"].fill;
      c.beginPath();
      c.moveTo(x0, y0);
      c.bezierCurveTo(x0, y0 + bend, x1, y1 - bend, x1, y1);
      c.stroke();
      const tip = down ? -4 : 4;
      c.beginPath();
      c.moveTo(x1, y1);
      c.lineTo(x1 - 2.5, y1 + tip);
      c.lineTo(x1 + 2.5, y1 + tip);
      c.fill();
    }
    c.globalAlpha = 1;
  }

  private drawSpan(span: Span, view: View): void {
    const { context: c, palette: p } = this;
    const { fill, ink } = p.kinds[span.kind];
    const x = this.x(span.start);
    // A hair of air between neighbours keeps them apart where they have the same colour.
    const w = Math.max(1, this.x(span.end) - x - (this.x(span.end) - x > 4 ? 1 : 0));
    const y = this.top(span.rank);
    c.globalAlpha = view.cursor !== null && span.start > view.cursor ? 0.16 : 1;
    c.fillStyle = fill;
    this.box(x, y, w, this.lane, 3);
    c.fill();
    c.fillStyle = ink;
    const level = this.level(span, view);
    // A device with several stages: a bar under the boxes of its second, two under those of its third.
    for (let i = 0; i < level && w > 4; i++) c.fillRect(x + 2, y + this.lane - 4 - 4 * i, w - 4, 2);
    const text = boxLabel(span);
    const middle = y + this.lane / 2 + 0.5 - 1.5 * level;
    c.textAlign = "center";
    c.textBaseline = "middle";
    for (const size of [13, 11, 10]) {
      c.font = `600 ${size}px ${FONT}`;
      if (c.measureText(text).width + (size > 10 ? 5 : 2) > w) continue;
      c.fillText(text, x + w / 2, middle);
      c.globalAlpha = 1;
      return;
    }
    // Too narrow for one line: the letter above the number.
    c.font = `600 9px ${FONT}`;
    if (text.length > 1 && c.measureText(text.slice(1)).width <= w && c.measureText(text[0]).width <= w) {
      c.fillText(text[0], x + w / 2, middle - 6);
      c.fillText(text.slice(1), x + w / 2, middle + 6);
    }
    c.globalAlpha = 1;
  }

  private levels: { of: Step | null; first: Map<number, number[]> } = { of: null, first: new Map() };

  /** Which of its device's stages an action belongs to, from 0. */
  private level(span: Span, { step }: View): number {
    if (span.stage < 0 || step === null) return 0;
    if (this.levels.of !== step) {
      const first = new Map<number, number[]>();
      for (const { rank, stage, track } of step.spans) {
        if (track !== "compute" || stage < 0) continue;
        const stages = first.get(rank) ?? [];
        if (!stages.includes(stage))
          first.set(
            rank,
            [...stages, stage].sort((a, b) => a - b),
          );
      }
      this.levels = { of: step, first };
    }
    return Math.min(2, this.levels.first.get(span.rank)?.indexOf(span.stage) ?? 0);
  }

  private drawChosen(hit: Hit): void {
    const { context: c, palette: p } = this;
    const { rank, start, end } = "span" in hit ? hit.span : hit.gap;
    const x = this.x(start);
    c.strokeStyle = p.focus;
    c.lineWidth = 2.5;
    this.box(x - 1, this.top(rank) - 1, Math.max(3, this.x(end) - x) + 1, this.lane + 2, 4);
    c.stroke();
  }

  private drawCursor(time: number, devices: number): void {
    const { context: c, palette: p } = this;
    const x = Math.round(this.x(time)) + 0.5;
    c.strokeStyle = p.ink;
    c.lineWidth = 1.5;
    c.beginPath();
    c.moveTo(x, 0);
    c.lineTo(x, this.top(devices - 1) + this.lane + 4);
    c.stroke();
  }

  /** The step that is drawn. */
  get step(): Step | null {
    return this.view?.step ?? null;
  }

  /** What of a step is, or would be, drawn at a point of the canvas. */
  find(step: Step | null, x: number, y: number): Hit | null {
    if (step === null) return null;
    const rank = step.busy.findIndex((_, r) => y >= this.top(r) - 4 && y <= this.top(r) + this.lane + 4);
    const inside = (start: number, end: number) => x >= this.x(start) && x <= this.x(end);
    const span = step.spans.find((s) => s.rank === rank && s.track === "compute" && inside(s.start, s.end));
    if (span !== undefined) return { span };
    const gap = step.gaps.find((g) => g.rank === rank && inside(g.start, g.end));
    return gap === undefined ? null : { gap };
  }
}

/** About so many round times up to an end. */
export function ticks(end: number, about: number): number[] {
  if (!(end > 0) || !Number.isFinite(end)) return [0];
  const raw = end / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].map((m) => m * power).find((candidate) => candidate >= raw) ?? raw;
  // The last one would lose half its label over the edge.
  return Array.from({ length: Math.floor((end * 0.965) / size) + 1 }, (_, i) => i * size);
}

/** Without the zeros that a duration has for its steady width. */
const axisLabel = (time: number) =>
  duration(time)
    .replace(/\.0+(?=\D)/, "")
    .replace(/(\.\d*?)0+(?=\D)/, "$1");

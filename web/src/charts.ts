// The two charts: loss with the run on one device over it, and accuracy.
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { need, onFrame, say } from "./dom";
import { loss as lossWords, percent } from "./format";
import { History } from "./history";
import { palette } from "./palette";
import type { Shown, Stepped } from "./protocol";
import { agreement } from "./words";

type Line = { label: string; colour: () => string; width: number; dash?: number[]; points?: boolean };

/** How far apart the labels of steps may be: there is no half a step. */
const STEPS = [1, 10, 100, 1e3, 1e4, 1e5, 1e6].flatMap((power) => [power, 2 * power, 5 * power]);

/** Of the changes of a plan, so many are told below the chart. */
const MARKS_TOLD = 3;

class Chart {
  readonly history: History;
  /** Steps at which a line is drawn from top to bottom. */
  marks: number[] = [];
  private plot: uPlot | null = null;
  readonly draw = onFrame(() => this.render());

  constructor(
    private readonly place: HTMLElement,
    private readonly lines: Line[],
    private readonly range: [number | null, number | null],
    private readonly words: (value: number, all: number[]) => string,
    private readonly height: number,
  ) {
    this.history = new History(lines.length);
    new ResizeObserver(() => this.draw()).observe(place);
  }

  /** Builds it again, in the colours in force. */
  repaint(): void {
    this.plot?.destroy();
    this.plot = null;
    this.draw();
  }

  private render(): void {
    const width = this.place.clientWidth;
    if (width === 0) return;
    const data = this.history.columns as uPlot.AlignedData;
    if (this.plot === null) this.plot = new uPlot(this.options(width), data, this.place);
    else {
      if (this.plot.width !== width) this.plot.setSize({ width, height: this.height });
      this.plot.setData(data);
    }
  }

  private options(width: number): uPlot.Options {
    const { soft, line } = palette();
    const font = "11px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
    const axis = { stroke: soft, font, ticks: { show: false }, grid: { stroke: line, width: 1 } };
    const [low, high] = this.range;
    return {
      width,
      height: this.height,
      legend: { show: false },
      cursor: { show: false },
      scales: {
        x: { time: false, range: (_, min, max) => [min ?? 0, Math.max((min ?? 0) + 10, max ?? 10)] },
        y: {
          range: (_, min, max) => {
            const pad = Math.max(0.02, ((max ?? 1) - (min ?? 0)) * 0.08);
            return [low ?? (min ?? 0) - pad, high ?? (max ?? 1) + pad];
          },
        },
      },
      axes: [
        { ...axis, size: 24, gap: 4, space: 60, incrs: STEPS },
        { ...axis, size: 42, gap: 6, space: 36, values: (_, all) => all.map((value) => this.words(value, all)) },
      ],
      hooks: { draw: [(plot) => this.drawMarks(plot, soft)] },
      series: [
        {},
        ...this.lines.map((one) => ({
          label: one.label,
          stroke: one.colour(),
          width: one.width,
          dash: one.dash,
          spanGaps: true,
          points: { show: one.points ?? false, size: 5 },
        })),
      ],
    };
  }

  private drawMarks({ ctx, bbox, scales, valToPos }: uPlot, colour: string): void {
    ctx.save();
    ctx.strokeStyle = colour;
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const step of this.marks) {
      if (step < (scales.x.min ?? 0) || step > (scales.x.max ?? 0)) continue;
      const x = Math.round(valToPos(step, "x", true)) + 0.5;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }
}

export class Charts {
  private readonly loss = new Chart(
    need("loss-chart"),
    [
      // Broad below, thin and dashed above: where they are the same both are seen.
      { label: "loss", colour: () => palette().kinds.forward.fill, width: 4 },
      { label: "on one device", colour: () => palette().ink, width: 1.5, dash: [5, 5] },
    ],
    [null, null],
    (value, all) => value.toFixed(all[1] - all[0] < 0.095 ? 2 : 1),
    230,
  );
  private readonly accuracy = new Chart(
    need("accuracy-chart"),
    [{ label: "right", colour: () => palette().kinds.forward.fill, width: 2, points: true }],
    [0, 1],
    percent,
    130,
  );
  /** What was changed, by the step after which it was. */
  private changes = new Map<number, string>();
  private fewest = 17;
  private compared = 0;

  constructor() {
    this.clear();
  }

  clear(): void {
    this.loss.history.clear();
    this.accuracy.history.clear();
    this.changes.clear();
    this.tellChanges();
    this.fewest = 17;
    this.compared = 0;
    say(need("agreement"), "");
    this.redraw();
  }

  /** The plan is another one from here on. */
  mark(step: number, change: string): void {
    if (step === 0 || change === "") return;
    // Of changes at the same step only the last one was trained with.
    this.changes.set(step, change);
    this.tellChanges();
    this.redraw();
  }

  private tellChanges(): void {
    this.loss.marks = [...this.changes.keys()];
    const told = [...this.changes].slice(-MARKS_TOLD).map(([step, change]) => `step ${step}, ${change}`);
    const more = this.changes.size > MARKS_TOLD ? "The last changes" : "Changed";
    say(need("changes"), told.length === 0 ? "" : `${more} (dotted): ${told.join("; ")}.`);
  }

  /** A run that goes on from an earlier step takes the place of what came after it. */
  goOn(step: number): void {
    for (const at of this.changes.keys()) if (at > step) this.changes.delete(at);
    this.tellChanges();
    this.loss.history.since(step);
    this.accuracy.history.since(step);
    this.redraw();
  }

  redraw(): void {
    this.loss.draw();
    this.accuracy.draw();
  }

  repaint(): void {
    this.loss.repaint();
    this.accuracy.repaint();
  }

  update({ step, loss, reference, digits }: Stepped): void {
    this.loss.history.push(step, loss, reference);
    this.loss.draw();
    const place = need("agreement");
    if (reference === null || digits === null) {
      say(place, "The comparison is off, so there is only one line.");
      return;
    }
    this.compared++;
    this.fewest = Math.min(this.fewest, digits);
    const always =
      this.fewest === digits
        ? `and at no step so far less (${this.compared} compared)`
        : `and over ${this.compared} steps at least ${agreement(this.fewest)}`;
    say(
      place,
      `At step ${step} the losses are ${lossWords(loss)} and ${lossWords(reference)}: they agree ${agreement(digits)}, ${always}.`,
    );
  }

  shown({ step, accuracy }: Shown): void {
    const steps = this.accuracy.history.columns[0];
    if (accuracy === null || step === steps[steps.length - 1]) return;
    this.accuracy.history.push(step, accuracy);
    this.accuracy.draw();
  }
}

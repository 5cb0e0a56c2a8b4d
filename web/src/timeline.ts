// The two timelines, measured and simulated, on one scale: live, frozen, stepped through, replayed.
import { need, onFrame, say, stillness } from "./dom";
import { duration, percent } from "./format";
import { Lanes, type Hit } from "./lanes";
import { drawLegend } from "./legend";
import { palette } from "./palette";
import type { Run, Span, Step, Stepped } from "./protocol";
import { actionSentence, gapSentence, list, inside, moment } from "./words";

/** A replay takes this long, whatever the step took. */
const REPLAY = 14_000;

export class TimelineView {
  private readonly measured = new Lanes(need<HTMLCanvasElement>("measured"), true);
  private readonly simulated = new Lanes(need<HTMLCanvasElement>("simulated"), false);
  private readonly figure = need("timeline");
  private readonly sentence = need("action");
  private readonly freezeButton = need<HTMLButtonElement>("freeze");
  private readonly replayButton = need<HTMLButtonElement>("replay");
  private readonly scrub = need<HTMLInputElement>("scrub");
  private run: Run | null = null;
  private live: Stepped | null = null;
  private held: Stepped | null = null;
  private expected = "";
  private scale = 0;
  private cursor: number | null = null;
  private chosen: { hit: Hit; simulated: boolean; pinned: boolean } | null = null;
  private pointer: { lanes: Lanes; x: number; y: number } | null = null;
  private replayFrom = 0; // when the replay that runs would have begun at time 0; 0: none runs
  private readonly draw = onFrame(() => this.render());

  constructor() {
    new ResizeObserver(() => this.fit()).observe(this.measured.canvas.parentElement!);
    this.freezeButton.onclick = () => this.freeze(this.held === null);
    need("previous").onclick = () => this.move(-1);
    need("next").onclick = () => this.move(1);
    this.replayButton.onclick = () => (this.replayFrom === 0 ? this.replay() : this.stopReplay());
    this.scrub.oninput = () => this.seek((Number(this.scrub.value) / 1000) * (this.shown()?.seconds ?? 0));
    this.figure.addEventListener("keydown", (event) => this.key(event));
    for (const lanes of [this.measured, this.simulated]) {
      const point = (event: MouseEvent, pinned: boolean) => {
        const { left, top } = lanes.canvas.getBoundingClientRect();
        const [x, y] = [event.clientX - left, event.clientY - top];
        this.pointer = pinned ? null : { lanes, x, y };
        this.point(lanes.find(lanes.step, x, y), lanes === this.simulated, pinned);
      };
      lanes.canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && point(event, false));
      lanes.canvas.addEventListener("click", (event) => point(event, true));
      lanes.canvas.addEventListener("pointerleave", () => {
        this.pointer = null;
        this.point(null, false, false);
      });
    }
  }

  open(run: Run): void {
    this.run = run;
    this.live = null;
    this.unfreeze();
    this.expected = "Press Train: this is drawn as it happens";
    this.scale = 0;
    this.fit();
  }

  /** What to say in the place of a measured step until there is one. */
  expect(words: string): void {
    this.expected = words;
    this.draw();
  }

  update(stepped: Stepped): void {
    this.live = stepped;
    // What was chosen belongs to a step that is no longer drawn; what is pointed at is found again.
    if (this.held === null) {
      this.chosen = null;
      this.cursor = null;
    }
    this.draw();
  }

  /** New colours, or a new width. */
  fit(): void {
    const width = this.measured.canvas.parentElement!.clientWidth;
    const devices = this.run?.devices.length ?? 2;
    const colours = palette();
    this.measured.fit(width, devices, colours);
    this.simulated.fit(width, devices, colours);
    this.render();
  }

  /** The step in view: the measured one, and before there is any, the simulated one. */
  private shown(): Step | null {
    const stepped = this.held ?? this.live;
    return stepped?.measured ?? this.run?.predicted ?? null;
  }

  freeze(on: boolean): void {
    if (on) this.hold();
    else this.unfreeze();
    this.draw();
  }

  /** Keeps the step in view. What is simulated before anything is measured stays by itself. */
  private hold(): void {
    this.held ??= this.live;
  }

  private unfreeze(): void {
    this.held = null;
    this.stopReplay();
    this.cursor = null;
    this.chosen = null;
  }

  private point(hit: Hit | null, simulated: boolean, pinned: boolean): void {
    if (hit === null && this.chosen?.pinned && !pinned) return;
    if (hit !== null && this.chosen?.pinned && !pinned) return;
    this.chosen = hit === null ? null : { hit, simulated, pinned };
    if (pinned && hit !== null) this.hold();
    this.draw();
  }

  private actions(step: Step): Span[] {
    return step.spans.filter((span) => span.track === "compute").sort((a, b) => a.start - b.start || a.rank - b.rank);
  }

  /** To the next or the previous action of all devices. */
  private move(by: number): void {
    this.stopReplay();
    this.hold();
    const step = this.shown();
    if (step === null) return;
    const all = this.actions(step);
    const current =
      this.chosen !== null && "span" in this.chosen.hit && !this.chosen.simulated
        ? all.indexOf(this.chosen.hit.span)
        : -1;
    const from =
      current >= 0
        ? current
        : this.cursor === null
          ? by > 0
            ? -1
            : all.length
          : all.filter((span) => span.start < this.cursor!).length - (by > 0 ? 1 : 0);
    this.choose(all[Math.max(0, Math.min(all.length - 1, from + by))]);
  }

  /** To the action of another device at the same time. */
  private across(by: number): void {
    const step = this.shown();
    if (step === null) return;
    const at = this.chosen !== null && "span" in this.chosen.hit ? this.chosen.hit.span : null;
    if (at === null) return this.move(1);
    const rank = Math.max(0, Math.min(step.busy.length - 1, at.rank + by));
    const there = this.actions(step).filter((span) => span.rank === rank);
    const nearest = there.reduce<Span | null>(
      (a, b) => (a === null || Math.abs(b.start - at.start) < Math.abs(a.start - at.start) ? b : a),
      null,
    );
    if (nearest !== null) this.choose(nearest);
  }

  private choose(span: Span | undefined): void {
    if (span === undefined) return;
    this.chosen = { hit: { span }, simulated: false, pinned: true };
    this.cursor = span.start;
    this.draw();
  }

  private seek(time: number): void {
    this.stopReplay();
    this.hold();
    this.chosen = null;
    this.cursor = time;
    this.draw();
  }

  private key(event: KeyboardEvent): void {
    const keys: Record<string, () => void> = {
      ArrowRight: () => this.move(1),
      ArrowLeft: () => this.move(-1),
      ArrowDown: () => this.across(1),
      ArrowUp: () => this.across(-1),
      Home: () => this.choose(this.actions(this.shown()!)[0]),
      Escape: () => this.freeze(false),
    };
    const act = keys[event.key];
    if (act === undefined || this.shown() === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  }

  private replay(): void {
    const step = this.shown();
    if (step === null) return;
    this.hold();
    this.chosen = null;
    if (stillness.matches) {
      // Nothing moves by itself here: the slider takes the hand's pace instead.
      this.cursor = 0;
      this.scrub.focus();
      return this.draw();
    }
    this.replayFrom = performance.now();
    const frame = (now: number) => {
      if (this.replayFrom === 0) return;
      this.cursor = (Math.max(0, now - this.replayFrom) / REPLAY) * step.seconds;
      if (this.cursor >= step.seconds) {
        this.cursor = null;
        this.stopReplay();
      } else requestAnimationFrame(frame);
      this.render();
    };
    requestAnimationFrame(frame);
  }

  private stopReplay(): void {
    this.replayFrom = 0;
    this.draw();
  }

  /** A scale that does not follow every step: it changes when a step no longer fits or fills too little of it. */
  private rescale(needed: number): void {
    if (needed > this.scale || needed < this.scale * 0.72) this.scale = needed * 1.06;
  }

  private render(): void {
    const run = this.run;
    const stepped = this.held ?? this.live;
    const measured = stepped?.measured ?? null;
    const predicted = stepped?.predicted ?? run?.predicted ?? null;
    const devices = run?.devices.length ?? 2;
    this.rescale(Math.max(measured?.seconds ?? 0, predicted?.seconds ?? 0, 1e-9));
    if (this.held === null && this.chosen === null && this.pointer !== null) {
      const { lanes, x, y } = this.pointer;
      const simulated = lanes === this.simulated;
      const hit = lanes.find(simulated ? predicted : measured, x, y);
      if (hit !== null) this.chosen = { hit, simulated, pinned: false };
    }
    const chosen = this.chosen;
    // Before anything is measured the simulated step is the one that is stepped through.
    const inMeasured = measured !== null && chosen !== null && !chosen.simulated;
    const shared = { devices, scale: this.scale, cursor: this.cursor };
    this.measured.draw({
      ...shared,
      step: measured,
      chosen: inMeasured ? chosen.hit : null,
      words: run === null ? "The engine is starting" : this.expected,
    });
    this.simulated.draw({
      ...shared,
      step: predicted,
      chosen: inMeasured || chosen === null ? null : chosen.hit,
      words: "Nothing has been simulated yet",
    });
    this.describe(stepped, measured, predicted);
  }

  private describe(stepped: Stepped | null, measured: Step | null, predicted: Step | null): void {
    const frozen = this.held !== null;
    this.figure.classList.toggle("frozen", frozen);
    this.figure.dataset.step = stepped === null ? "" : String(stepped.step);
    this.freezeButton.setAttribute("aria-pressed", String(frozen));
    this.freezeButton.disabled = this.live === null;
    say(this.freezeButton, frozen ? "Go live" : "Freeze");
    say(this.replayButton, this.replayFrom !== 0 ? "Stop replay" : "Replay slowly");
    say(
      need("measured-step"),
      stepped === null ? "" : frozen ? `frozen at step ${stepped.step}` : `step ${stepped.step}`,
    );
    const isGuess = stepped === null && this.run?.step === 0;
    const from = isGuess ? "a guess, before anything was measured: " : "from how long each action took: ";
    say(need("measured-words"), measured === null ? "" : bubble(measured, "stood idle"));
    say(need("simulated-words"), predicted === null ? "" : from + bubble(predicted, "would stand idle"));
    const step = this.shown();
    this.scrub.disabled = step === null;
    const at = step === null || this.cursor === null ? 0 : Math.round((this.cursor / step.seconds) * 1000);
    if (Number(this.scrub.value) !== at) this.scrub.value = String(at);
    this.scrub.setAttribute("aria-valuetext", this.cursor === null ? "whole step" : duration(this.cursor));
    say(this.sentence, this.words(step));
    drawLegend(measured, predicted);
  }

  private words(step: Step | null): string {
    if (step === null) return "";
    if (this.chosen !== null) {
      const { hit, simulated } = this.chosen;
      const of = simulated ? ((this.held ?? this.live)?.predicted ?? this.run?.predicted ?? step) : step;
      const words = "span" in hit ? actionSentence(hit.span, of) : gapSentence(hit.gap);
      return simulated || this.live === null ? `Simulated: ${words}` : words;
    }
    if (this.cursor !== null) return moment(step, this.cursor);
    return "Point at a box or tap it, or use the arrow keys, to read what happens there.";
  }
}

/** The bubble of a step in a sentence. */
function bubble(step: Step, verb: string): string {
  const idle = step.busy.map((busy, rank) => ({ rank, idle: 1 - busy }));
  if (step.busy.length === 1) return `${duration(step.seconds)} · one device, which waits for nobody`;
  const most = Math.max(...idle.map((one) => one.idle));
  const who = idle.filter((one) => one.idle > most - 0.02);
  const whom = who.length === idle.length ? "" : `, ${list(who.map((one) => inside(one.rank)))} most`;
  return `${duration(step.seconds)} · devices ${verb} ${percent(step.bubble)} of the time${whom}`;
}

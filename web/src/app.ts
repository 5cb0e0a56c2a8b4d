// The page: what is wanted (settings, whether it trains), what is so (the run that is open), and how one becomes the other.
import "./style.css";
import { Blocks } from "./blocks";
import { Charts } from "./charts";
import { Client } from "./client";
import { Controls } from "./controls";
import { Devices } from "./devices";
import { need, onFrame, say } from "./dom";
import { Explanations } from "./explain";
import { drawChecked, wireExtras } from "./extras";
import { EngineFailure, failureOf, headline } from "./failures";
import { Figures } from "./figures";
import { makeLegend, paintLegend } from "./legend";
import { dismiss, notice } from "./notices";
import { Planner } from "./planner";
import type { Catalog, Event, Failure, Run, Settings, Shown, Stepped } from "./protocol";
import { changed, keepsWeights, MOST_DEVICES, read, write } from "./settings";
import { ShownView } from "./shown";
import { startTheme } from "./theme";
import { TimelineView } from "./timeline";
import { offerWithout, tellFailure, tellSilence, type Ways } from "./trouble";
import { count, FIRST, numberDevices, planChange } from "./words";

/** So long without a word from the engine, in seconds, before the page offers to start it anew. */
const SILENT = 90;
const TITLE = document.title;

class App {
  private catalog: Catalog | null = null;
  private wanted: Settings | null = null;
  private good: Settings | null = null; // what the newest run was opened with
  private run: Run | null = null;
  private shownRun: Run | null = null; // the newest that was opened, whether or not it is there still
  private training = false; // what the person wants; the worker follows
  private pending: { keep: boolean } | null = null;
  private opening = false;
  private openDone: Promise<void> = Promise.resolve();
  private unplugged = -1; // the device that was given up here
  private step = 0;
  private last: Stepped | null = null;
  private hiddenAt = -1;
  private controls!: Controls;
  private explanations!: Explanations;
  private readonly client = new Client({ event: (event) => this.event(event), died: (failure) => this.died(failure) });
  private readonly timeline = new TimelineView();
  private readonly figures = new Figures();
  private readonly charts = new Charts();
  private readonly shownView = new ShownView();
  private readonly blocks = new Blocks((cuts) => this.change({ cuts }));
  private readonly devices = new Devices({
    slow: (index, factor) => this.change({ slow: this.wanted!.slow.map((was, i) => (i === index ? factor : was)) }),
    lose: (rank) => this.lose(rank),
    add: () => this.change({ devices: Math.min(MOST_DEVICES, this.wanted!.devices + 1) }),
  });
  private readonly planner = new Planner((settings) => this.go(changed(this.wanted!, settings), true));
  private readonly paintStep = onFrame(() => this.renderStep());
  private readonly ways: Ways = {
    again: () => (this.catalog === null ? void this.start() : this.open(true)),
    go: (settings, keep, training) => {
      this.training = training;
      this.go(settings, keep);
    },
  };

  constructor() {
    makeLegend();
    startTheme(() => {
      this.timeline.fit();
      this.charts.repaint();
      paintLegend();
    });
    need("train").onclick = () => (this.training ? this.pause() : this.train());
    need("one").onclick = () => this.one();
    need("reset").onclick = () => this.reset();
    need("compare").onclick = () => this.change({ reference: !this.wanted!.reference });
    need("advise").onclick = () => this.advise();
    wireExtras({
      client: this.client,
      step: () => this.step,
      wanted: () => this.wanted,
      attempt: (act) => this.attempt(act),
    });
    addEventListener("hashchange", () => this.follow());
    document.addEventListener("visibilitychange", () => this.visibility());
    setInterval(() => this.listen(), 5000);
    void this.start();
  }

  private async start(): Promise<void> {
    dismiss("failure");
    try {
      this.catalog = await this.client.catalog();
    } catch (error) {
      this.failed(failureOf(error));
      return;
    }
    say(need("version"), `Polystage ${this.catalog.version}`);
    this.controls = new Controls(this.catalog, (change) => this.change(change));
    this.explanations = new Explanations(this.catalog, (change) => this.change(change));
    this.readAddress(this.catalog);
    this.open(false);
  }

  // Settings

  private readAddress(catalog: Catalog): Settings {
    const { settings, problems } = read(location.hash, catalog);
    this.wanted = settings;
    this.controls.show(settings);
    dismiss("address");
    if (problems.length > 0) {
      notice({
        subject: "address",
        title: "Some of the settings in the address were left out.",
        text: problems.join(" "),
      });
    }
    return settings;
  }

  /** The fragment was changed by hand, or by going back. */
  private follow(): void {
    const before = this.wanted;
    if (this.catalog === null || before === null || location.hash === write(before)) return;
    this.open(keepsWeights(before, this.readAddress(this.catalog)));
  }

  private change(change: Partial<Settings>): void {
    const before = this.wanted;
    if (before === null) return;
    const settings = changed(before, change);
    const { slow } = change;
    if (slow !== undefined && Object.keys(change).length === 1 && this.run !== null && !this.opening)
      this.slow(settings, slow, this.run);
    else this.go(settings, keepsWeights(before, settings));
  }

  /** Other settings, for which a run is opened. */
  private go(settings: Settings, keep: boolean): void {
    this.want(settings);
    this.open(keep);
  }

  private want(settings: Settings): void {
    this.wanted = settings;
    this.controls.show(settings);
    history.replaceState(null, "", write(settings));
  }

  /** Devices get slower or faster while the run stays as it is. */
  private slow(settings: Settings, slow: number[], run: Run): void {
    this.want(settings);
    void this.attempt(() => this.client.slow(slow));
    slow.forEach((factor, index) => {
      if (factor === (run.settings.slow[index] ?? 1)) return;
      const words = factor === 1 ? "at full speed" : `${factor} times as long`;
      this.charts.mark(this.step, `device ${index + FIRST} ${words}`);
    });
    run.settings.slow = [...slow];
    run.devices.forEach((one) => (one.slow = slow[one.index]));
    this.devices.open(run);
    this.explanations.open(run);
    this.paintStep();
  }

  // The run

  /** Opens a run as it is wanted now; several calls while one is being opened become one. */
  private open(keep: boolean): void {
    this.pending = { keep: keep && (this.pending?.keep ?? true) };
    if (!this.opening) this.openDone = this.openAll();
  }

  private async openAll(): Promise<void> {
    this.opening = true;
    while (this.pending !== null && this.wanted !== null) {
      const { keep } = this.pending;
      this.pending = null;
      this.status(keep && this.run !== null ? "Opening the run again, with its weights." : "Opening the devices.");
      this.buttons();
      for (const subject of ["lost", "failure", "silent"]) dismiss(subject);
      try {
        const settings = this.wanted;
        this.opened(await this.client.open(settings, keep), settings);
      } catch (error) {
        this.run = null;
        this.failed(failureOf(error));
      }
    }
    this.opening = false;
    if (this.training && this.run !== null) this.launch();
    this.buttons();
  }

  private opened(run: Run, settings: Settings): void {
    const before = this.shownRun;
    this.run = this.shownRun = run;
    numberDevices(run);
    this.good = settings;
    this.unplugged = -1;
    this.figures.clear();
    this.last = null;
    if (run.step === 0) {
      this.planner.clear();
      this.charts.clear();
      this.shownView.open(run.settings.task);
    } else {
      this.charts.goOn(run.step);
      if (before !== null) this.charts.mark(run.step, planChange(before, run));
    }
    this.step = run.step;
    this.timeline.open(run);
    this.blocks.open(run);
    this.devices.open(run);
    this.explanations.open(run);
    this.honest(run);
    this.status(run.step === 0 ? "Ready." : `Ready to go on from step ${run.step}.`);
    this.paintStep();
  }

  private honest({ devices, adapters }: Run): void {
    const names = [...new Set(devices.map((one) => one.name))].join(" and ");
    const shared =
      "Devices of one GPU share its speed, so this shows how a pipeline works, not how fast it would be on several cards.";
    const words = `${count(adapters, "physical GPU")}, ${count(devices.length, "logical device")} (${names}).`;
    say(need("honest"), devices.length > adapters ? `${words} ${shared}` : words);
  }

  private train(): void {
    this.training = true;
    if (this.run === null) this.open(true);
    else if (!this.opening) this.launch();
    this.buttons();
  }

  private launch(): void {
    dismiss("failure");
    this.status(
      this.figures.steps > 0
        ? "Training."
        : "Training. The first step takes longest: programs for the graphics card are being compiled.",
    );
    this.timeline.expect("The first step is under way");
    void this.attempt(() => this.client.run());
  }

  private async pause(): Promise<void> {
    this.training = false;
    this.buttons();
    if (this.opening) return;
    this.status("Pausing after the step that is under way.");
    if ((await this.attempt(() => this.client.pause())) && !this.training) this.status(`Paused at step ${this.step}.`);
  }

  private async one(): Promise<void> {
    this.training = false;
    if (this.run === null) this.open(true);
    this.buttons();
    await this.openDone;
    if (this.run === null) return;
    this.status("Doing one step.");
    this.timeline.expect("The first step is under way");
    await this.attempt(async () => {
      await this.client.pause();
      this.stepped(await this.client.step());
      this.status(`One step done: this is step ${this.step}.`);
      this.shown(await this.client.show());
    });
  }

  private reset(): void {
    this.training = false;
    this.open(false);
  }

  private lose(rank: number): void {
    void this.attempt(async () => {
      this.unplugged = rank;
      await this.client.lose(rank);
      // While it trains, the engine finds out in the next step.
      if (!this.training) this.failed({ kind: "lost", message: "It was unplugged", device: rank });
    });
  }

  private async advise(): Promise<void> {
    const run = this.run;
    if (run === null) return;
    this.planner.search();
    const done = await this.attempt(async () => {
      this.planner.show(await this.client.advise(), run, this.figures.speed() || run.tokens / run.predicted.seconds);
    });
    if (!done) this.planner.clear();
  }

  // What the engine says

  private event(event: Event): void {
    switch (event.event) {
      case "stepped":
        return this.stepped(event.stepped);
      case "shown":
        return this.shown(event.shown);
      case "checked":
        return drawChecked(event.done, event.all);
      case "paused":
        return;
      case "failure":
        return this.failed(event.failure);
    }
  }

  private stepped(stepped: Stepped): void {
    // A step of a run that is being replaced says nothing about the next one.
    if (this.opening) return;
    this.last = stepped;
    this.step = stepped.step;
    this.figures.count(stepped);
    this.timeline.update(stepped);
    this.charts.update(stepped);
    if (this.training && this.figures.steps === 1) this.status("Training.");
    this.paintStep();
  }

  private shown(shown: Shown): void {
    if (this.opening) return;
    this.shownView.update(shown);
    this.charts.shown(shown);
  }

  private renderStep(): void {
    const { last } = this;
    this.figures.show(this.step, last);
    document.title = this.training ? `▶ ${this.step} · Polystage` : TITLE;
    this.buttons();
    if (last === null) return;
    this.devices.update(last);
    this.explanations.bubble(last.measured, true);
    this.planner.update(this.figures.speed(), this.figures.steps);
  }

  // When things fail

  private async attempt(act: () => Promise<void>): Promise<boolean> {
    try {
      await act();
      return true;
    } catch (error) {
      // Whatever failed, what the page shows and what the worker does stay the same.
      if (this.training) void this.client.pause().catch(() => undefined);
      this.failed(failureOf(error));
      return false;
    } finally {
      this.buttons();
    }
  }

  private failed(failure: Failure): void {
    this.training = false;
    const { wanted } = this;
    if (failure.kind === "lost" && wanted !== null) {
      const device = failure.device < 0 ? this.unplugged : failure.device;
      this.status(`Stopped. ${headline({ ...failure, device })}`);
      const index = this.run?.devices[device]?.index ?? device;
      offerWithout({ ...failure, device }, index, wanted, this.step, this.ways);
    } else {
      this.status(`Stopped. ${headline(failure)}`);
      tellFailure(failure, wanted, this.good, this.catalog && structuredClone(this.catalog.defaults), this.ways);
    }
    this.buttons();
  }

  /** The worker is gone, and with it the weights. */
  private died({ failure }: EngineFailure): void {
    this.run = null;
    this.failed({
      ...failure,
      message: `${failure.message.replace(/\.$/, "")}. The weights are lost with it; training begins anew`,
    });
  }

  private listen(): void {
    const seconds = this.client.silence();
    if (seconds < SILENT) return dismiss("silent");
    tellSilence(seconds, () => {
      this.client.end(new EngineFailure({ kind: "failed", message: "The engine was started anew", device: -1 }));
      this.run = null;
      this.ways.again();
    });
  }

  private visibility(): void {
    if (document.hidden) this.hiddenAt = this.training ? this.step : -1;
    else if (this.hiddenAt >= 0 && this.training) {
      this.status(`Training went on in the background: ${count(this.step - this.hiddenAt, "step")}.`);
    }
  }

  private status(words: string): void {
    say(need("status"), words);
  }

  /** Which buttons work now, and what they are called. */
  private buttons(): void {
    const enable = (id: string, on: boolean) => (need<HTMLButtonElement>(id).disabled = !on);
    const train = need("train");
    train.dataset.state = this.training ? "on" : "off";
    say(train, this.training ? "Pause" : this.step > 0 ? "Go on" : "Train");
    const there = this.catalog !== null;
    const open = there && !this.opening && this.run !== null;
    enable("train", there);
    enable("one", there && !this.opening);
    enable("reset", there && !this.opening);
    const compared = this.wanted?.reference ?? false;
    say(need("compare"), compared ? "Stop comparing" : "Compare with one device");
    enable("compare", there);
    enable("advise", open);
    enable("download-model", open);
    enable("download-trace", open && this.last !== null);
    enable("verify", there && !this.opening);
  }
}

new App();

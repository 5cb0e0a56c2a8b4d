// The planner's advice, with the speed that it promises beside the one that is measured.
import { make, need } from "./dom";
import { times, whole } from "./format";
import type { Advice, Run, Settings } from "./protocol";

export class Planner {
  private readonly place = need("advice");
  /** What was promised when advice was taken over, and how fast it was before. */
  private promise: { predicted: number; before: number } | null = null;
  private outcome: HTMLElement | null = null;

  constructor(private readonly take: (settings: Settings) => void) {}

  clear(): void {
    this.promise = null;
    this.outcome = null;
    this.place.replaceChildren();
  }

  search(): void {
    this.promise = null;
    this.outcome = null;
    this.place.replaceChildren(make("p", {}, "It simulates every schedule, number of microbatches and cut."));
  }

  show(advice: Advice, run: Run, speed: number): void {
    const predicted = run.tokens / advice.predicted.seconds;
    const better = advice.gain > 1.01;
    const take = make("button", { type: "button", id: "take-over", class: "strong" }, "Take it over");
    take.onclick = () => {
      this.promise = { predicted, before: speed };
      this.outcome = make(
        "p",
        { class: "outcome", "data-test": "outcome" },
        "Taken over; the next steps are measured.",
      );
      this.place.replaceChildren(this.outcome);
      this.take(advice.settings);
    };
    this.place.replaceChildren(
      make("ul", {}, ...advice.words.map((line) => make("li", {}, line))),
      make(
        "dl",
        { class: "figures" },
        ...[
          ["measured now", `${whole(speed)} tokens/s`],
          ["predicted with it", `${whole(predicted)} tokens/s`],
          ["gain", times(advice.gain)],
        ].map(([term, value]) => make("div", {}, make("dt", {}, term), make("dd", {}, value))),
      ),
      ...(better ? [take] : []),
    );
  }

  /** After steps under the plan that was taken over. */
  update(speed: number, steps: number): void {
    if (this.promise === null || this.outcome === null || steps < 3) return;
    const { predicted, before } = this.promise;
    this.outcome.textContent = `Promised ${whole(predicted)} tokens/s, measured ${whole(speed)}; before it was ${whole(before)} (${times(speed / before)}).`;
  }
}

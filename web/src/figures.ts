// The four numbers beside the train button, and the speed behind them.
import { need, say } from "./dom";
import { loss as lossWords, percent, whole } from "./format";
import type { Stepped } from "./protocol";

/** Steps whose middle is the speed that is shown. */
const RECENT = 7;

export class Figures {
  private speeds: number[] = [];
  /** Steps since the run was opened. */
  steps = 0;

  clear(): void {
    this.speeds = [];
    this.steps = 0;
  }

  count(stepped: Stepped): void {
    this.steps++;
    this.speeds = [...this.speeds, stepped.tokens_per_second].slice(-RECENT);
  }

  /** The middle of the newest speeds: one slow step does not shake the number. */
  speed(): number {
    const sorted = [...this.speeds].sort((a, b) => a - b);
    return sorted[Math.floor(sorted.length / 2)] ?? 0;
  }

  show(step: number, last: Stepped | null): void {
    say(need("figure-step"), whole(step));
    say(need("figure-loss"), last === null ? "–" : lossWords(last.loss));
    say(need("figure-speed"), last === null ? "–" : whole(this.speed()));
    say(need("figure-idle"), last === null ? "–" : percent(last.measured.bubble));
  }
}

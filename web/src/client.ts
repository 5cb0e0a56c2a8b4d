// The page's end of the worker: promises for requests, a callback for what the worker says unasked. When the worker dies
// everything that waits is refused, and the next request starts another one, so that the page goes on.
import { EngineFailure, failureOf } from "./failures";
import type { Advice, Answer, Catalog, Event, Request, Run, Settings, Shown, Stepped, Verified } from "./protocol";

type Unnumbered<T> = T extends { id: number } ? Omit<T, "id"> : never;
type Waiting = { resolve: (answer: Answer) => void; reject: (failure: EngineFailure) => void };

export interface Listener {
  event(event: Event): void;
  /** The worker is gone, and the run with it. */
  died(failure: EngineFailure): void;
}

export class Client {
  private worker: Worker | null = null;
  private next = 1;
  private readonly waiting = new Map<number, Waiting>();
  private lastSign = 0;
  private running = false;

  constructor(private readonly listener: Listener) {}

  async catalog(): Promise<Catalog> {
    return (await this.ask({ ask: "catalog" }, "catalog")).catalog;
  }

  async open(settings: Settings, keep: boolean): Promise<Run> {
    this.running = false;
    return (await this.ask({ ask: "open", settings, keep }, "run")).run;
  }

  async step(): Promise<Stepped> {
    return (await this.ask({ ask: "step" }, "stepped")).stepped;
  }

  async run(): Promise<void> {
    await this.ask({ ask: "run" }, "done");
    this.running = true;
  }

  async pause(): Promise<void> {
    await this.ask({ ask: "pause" }, "done");
    this.running = false;
  }

  async slow(slow: number[]): Promise<void> {
    await this.ask({ ask: "slow", slow }, "done");
  }

  async show(): Promise<Shown> {
    return (await this.ask({ ask: "show" }, "shown")).shown;
  }

  async advise(): Promise<Advice> {
    return (await this.ask({ ask: "advise" }, "advice")).advice;
  }

  async lose(device: number): Promise<void> {
    await this.ask({ ask: "lose", device }, "done");
  }

  async trace(): Promise<string> {
    return (await this.ask({ ask: "trace" }, "trace")).trace;
  }

  async model(): Promise<Uint8Array> {
    return (await this.ask({ ask: "model" }, "model")).model;
  }

  async verify(): Promise<Verified> {
    return (await this.ask({ ask: "verify" }, "verified")).verified;
  }

  /** Ends `verify` early, with what it has found so far. */
  async stop(): Promise<void> {
    await this.ask({ ask: "stop" }, "done");
  }

  /** Seconds since the worker last said something, if it owes the page something. */
  silence(): number {
    return this.waiting.size > 0 || this.running ? (performance.now() - this.lastSign) / 1000 : 0;
  }

  /** Ends the worker, whatever it does. */
  end(failure: EngineFailure): void {
    this.worker?.terminate();
    this.worker = null;
    this.running = false;
    const waiting = [...this.waiting.values()];
    this.waiting.clear();
    for (const { reject } of waiting) reject(failure);
  }

  private ask<K extends string>(request: Unnumbered<Request>, key: K): Promise<Extract<Answer, Record<K, unknown>>> {
    type Expected = Extract<Answer, Record<K, unknown>>;
    const id = this.next++;
    const worker = (this.worker ??= this.start());
    if (this.waiting.size === 0) this.lastSign = performance.now();
    return new Promise<Expected>((resolve, reject) => {
      const settle = (answer: Answer) => {
        if ("failure" in answer) reject(new EngineFailure(answer.failure));
        else if (key in answer) resolve(answer as Expected);
        else reject(new EngineFailure({ kind: "failed", message: "The engine answered something else.", device: -1 }));
      };
      this.waiting.set(id, { resolve: settle, reject });
      worker.postMessage({ ...request, id });
    });
  }

  private start(): Worker {
    const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
    worker.onmessage = ({ data }: MessageEvent<Answer | Event>) => {
      this.lastSign = performance.now();
      if ("event" in data) {
        if (data.event === "paused" || data.event === "failure") this.running = false;
        this.listener.event(data);
        return;
      }
      const waiting = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      waiting?.resolve(data);
    };
    worker.onerror = (event) => {
      event.preventDefault();
      if (worker !== this.worker) return;
      const failure = new EngineFailure(failureOf(event.message || "The engine did not start."));
      this.end(failure);
      this.listener.died(failure);
    };
    return worker;
  }
}

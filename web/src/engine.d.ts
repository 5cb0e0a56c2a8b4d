// What wasm-bindgen makes of the engine (src/web/ of the repository). Every string is the JSON of a type in protocol.ts,
// and everything throws an Error whose message is the JSON of a Failure.
declare module "engine" {
  export default function init(): Promise<unknown>;
  export function catalog(): string;
  export function verify(): Promise<string>;
  export class Session {
    private constructor();
    static open(settings: string, earlier: Session | undefined, keep: boolean): Promise<Session>;
    check(settings: string): void;
    run(): string;
    step(): Promise<string>;
    show(): Promise<string>;
    slow(slow: string): void;
    advise(): string;
    lose(device: number): void;
    trace(): string;
    model(): Promise<Uint8Array>;
    close(): Promise<void>;
  }
}

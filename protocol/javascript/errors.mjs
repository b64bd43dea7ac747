/** Text in which no URL holds a user and a password: what is logged is read by more people than the command line. */
export const withoutCredentials = (text) => text.replace(/(:\/{1,2})\S*(?:@|%40)/g, "$1***@");

/** Text without anything that steers a terminal or breaks a line: names and messages may come from anybody. */
export const printable = (text) => text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, "\ufffd");

/** A value as a line of JSON, in which such characters are escapes. */
export const jsonLine = (value, replacer) =>
  JSON.stringify(value, replacer).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (char) =>
    char.split("").map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`).join(""));

/** An end in words: one line on standard error and an exit code. */
export class Ended extends Error {
  constructor(code, message) {
    super(printable(withoutCredentials(message)));
    this.code = code;
  }
}

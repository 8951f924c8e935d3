import { Command } from "./command.ts";

/** `help [command]`: shows the help of the program, or of one of its commands. */
export class HelpCommand extends Command<unknown, unknown, [command?: string]> {
  constructor() {
    super();
    this.description("Show this help or the help of a command.")
      .arguments("[command:string]")
      .action(async (_options, name) => {
        const group = this.getParent()!;
        const command = name === undefined
          ? group
          : group.getCommands().find((child) => child.getName() === name);
        if (command !== undefined) command.showHelp();
        // Calling what does not exist gives the error with the suggestion.
        else await group.parse([name!]);
      });
  }
}

// Tells each pre-traffic hook which version it is to try: the one that this deployment publishes, whose logical name osls makes of
// what is in it. `custom.hooks` names the function of each hook. Alarms on the new version alone (Lambda's `ExecutedVersion`, our own
// `function_version`) get its number in place of the function's name.
'use strict';

module.exports = class Hooks {
  constructor(serverless) {
    this.hooks = {
      'package:compileEvents': () => {
        const { service } = serverless;
        const { Resources } = service.provider.compiledCloudFormationTemplate;
        const naming = serverless.getProvider('aws').naming;
        for (const [hook, name] of Object.entries(service.custom.hooks)) {
          const { Environment } = Resources[naming.getLambdaLogicalId(hook)].Properties;
          Environment.Variables.TRIFORM_TARGET = { Ref: service.getFunction(name).versionLogicalId };
        }
        this.nameVersions(service.resources, service);
      },
    };
  }

  nameVersions(value, service) {
    if (value === null || typeof value !== 'object') return;
    if (['ExecutedVersion', 'function_version'].includes(value.Name) && typeof value.Value === 'string') {
      value.Value = { 'Fn::GetAtt': [service.getFunction(value.Value).versionLogicalId, 'Version'] };
    } else {
      for (const inner of Object.values(value)) this.nameVersions(inner, service);
    }
  }
};
